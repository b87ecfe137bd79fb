//! `man`: the manual pages, made from the same words as `--help`.

use std::path::Path;

use clap::CommandFactory;

use crate::{args::Cli, error::Failure};

pub(super) fn run(dir: &Path) -> Result<(), Failure> {
    clap_mangen::generate_to(Cli::command(), dir).map_err(|source| {
        Failure::local(
            format!("cannot write manual pages to {}: name a folder that is there", dir.display()),
            source,
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_command_has_a_page_with_its_examples() {
        let folder = tempfile::tempdir().unwrap();
        run(folder.path()).unwrap();
        let page = std::fs::read_to_string(folder.path().join("serio-vm-run.1")).unwrap();
        assert!(page.contains("serio vm run ardesio/web"), "{page}");
        assert!(folder.path().join("serio.1").exists());
        assert!(matches!(run(&folder.path().join("missing")), Err(Failure::Local { .. })));
    }
}
