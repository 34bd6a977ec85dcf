//! `kms-server`: the thin binary over the library.

fn main() -> std::process::ExitCode {
    kms_server::command_line::main()
}
