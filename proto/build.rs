//! Compiles the contract with protox: no protoc is needed.
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=meterkms");
    let files: Vec<_> = std::fs::read_dir("meterkms/v1")?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "proto"))
        .collect();
    let descriptors = protox::compile(&files, ["."])?;
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("meterkms.v1.descriptors"), protox::prost::Message::encode_to_vec(&descriptors))?;
    tonic_prost_build::configure().bytes(".meterkms.v1").compile_fds(descriptors)?;
    Ok(())
}
