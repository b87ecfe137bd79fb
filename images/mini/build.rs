//! Names the linker script by its full path, so that the crate builds from any folder.
fn main() {
    let here = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    println!("cargo:rustc-link-arg=-T{here}/mini.ld");
    println!("cargo:rerun-if-changed=mini.ld");
    println!("cargo:rerun-if-changed=src/boot.s");
    println!("cargo:rerun-if-changed=src/interrupt.s");
}
