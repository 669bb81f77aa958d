//! `towline serve`: the embedded inference server.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::json;
use towline_core::{ModelId, Result};

use super::output::Output;
use crate::server::{Server, ServerOptions};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve completions and the hot-load API; weights come from a store.
    #[command(after_help = "Example:\n  towline serve engine --store ./store --port 8000")]
    Engine(Engine),
}

#[derive(Debug, Args)]
pub(crate) struct Engine {
    /// The store that snapshots are read from: a directory, or an s3://, gs:// or az:// URL.
    #[arg(long)]
    store: String,
    /// The port; 0 for a free one, which is printed.
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// The address to listen on.
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    host: IpAddr,
    /// The model's name.
    #[arg(long, default_value = "towline")]
    model: String,
    /// A model of the registry to serve from the start; without it nothing is served until the first hot-load.
    #[arg(long, value_name = "MODEL_ID")]
    promoted: Option<ModelId>,
    /// Milliseconds after the start before hot-loads are taken (health is green at once).
    #[arg(long, default_value_t = 0)]
    ready_after_ms: u64,
}

pub(crate) async fn run(command: Command, output: &Output) -> Result<()> {
    let Command::Engine(options) = command;
    let store = crate::store::open_store(&options.store)?;
    let server_options = ServerOptions::default()
        .with_address(SocketAddr::new(options.host, options.port))
        .with_model(options.model)
        .with_promoted(options.promoted)
        .with_ready_after(Duration::from_millis(options.ready_after_ms));
    let server = Server::start(store, server_options).await?;
    output.result(format_args!("listening on {}", server.url()), &json!({"url": server.url()}));
    tokio::select! {
        () = server.wait() => Ok(()),
        _ = tokio::signal::ctrl_c() => Ok(()),
    }
}
