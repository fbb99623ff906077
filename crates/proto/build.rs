//! Compiles the protocol files without `protoc`.

use std::{env, error::Error, fs, path::Path};

const FILES: [&str; 3] =
    ["envd/process/process.proto", "envd/filesystem/filesystem.proto", "hostagent/v1/hostagent.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto");
    println!("cargo:rerun-if-changed={}", root.display());
    let mut compiler = protox::Compiler::new([&root])?;
    compiler.include_imports(true).include_source_info(true);
    for file in FILES {
        compiler.open_file(file)?;
    }
    let set = Path::new(&env::var("OUT_DIR")?).join("descriptors.bin");
    fs::write(&set, compiler.encode_file_descriptor_set())?;
    connectrpc_build::Config::new()
        .descriptor_set(&set)
        .files(&FILES)
        .includes(&["."])
        .gate_client_feature(true)
        .include_file("_connectrpc.rs")
        .emit_rerun_directives(false)
        .compile()?;
    Ok(())
}
