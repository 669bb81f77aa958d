//! `kill-oracle`: training processes killed at random instants.

use std::time::Duration;

use serde_json::json;

use crate::args::Args;
use crate::stop::Result;
use crate::workspace::Context;

pub(crate) const HELP: &str = "\
Kills a training process at random instants, saves in flight included, and starts it again: every life must go on from
what was acknowledged and repeat the undisturbed run bit for bit. `ci` does it 20 times, among the tests.

Usage: cargo xtask kill-oracle [--kills N] [--json]

  --kills N   200 by default";

/// The test that does it, and what it counts by.
const TEST: &str = "a_killed_run_goes_on_bit_for_bit_from_what_was_acknowledged";
const KILLS: &str = "TOWLINE_KILLS";

pub(crate) fn command(context: &Context, mut args: Args) -> Result<()> {
    let kills: u64 = args.number("--kills")?.unwrap_or(200);
    args.finish()?;
    let said = context
        .cargo(&[
            "test",
            "--package",
            "towline-cookbook",
            "--test",
            "kill_oracle",
            "--",
            TEST,
            "--exact",
            "--nocapture",
        ])
        .env(KILLS, kills.to_string())
        .deadline(Duration::from_secs(3600))
        .output()?;
    let line = said.lines().find(|line| line.contains(" kills of ")).unwrap_or_default().trim();
    context.say(line);
    context.emit(&json!({"said": line}));
    Ok(())
}
