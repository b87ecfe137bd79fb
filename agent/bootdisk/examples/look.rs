//! Says what a raw disk boots with: `cargo run -p serio-bootdisk --example look -- disk.raw`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("which raw disk?")?;
    match serio_bootdisk::find(Box::new(std::fs::File::open(path)?)) {
        Ok(found) => {
            println!("{found:#?}");
            let kernel = found.write_kernel(&mut std::io::sink(), 1 << 30)?;
            let initrd = found.write_initrd(&mut std::io::sink(), 1 << 30)?;
            println!("kernel {kernel} bytes, initrds {initrd} bytes");
        }
        Err(error) => {
            println!("{error}");
            let mut source = std::error::Error::source(&error);
            while let Some(reason) = source {
                println!("  because {reason}");
                source = reason.source();
            }
        }
    }
    Ok(())
}
