//! The command line `towline`: see `towline --help`.

fn main() -> std::process::ExitCode {
    towline_cookbook::cli::main()
}
