//! What people type is understood, and what they mistype is refused with exit code 2.

use super::*;

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(line.split_whitespace())
}

#[test]
fn clap_finds_no_fault() {
    use clap::CommandFactory;
    Cli::command().debug_assert();
}

#[test]
fn the_promised_command_lines() {
    for line in [
        "serio doctor",
        "serio image import tiny --disk tiny.raw --format raw --kernel vmlinuz --initrd initrd.img --cmdline console=ttyS0",
        "serio vdc create ardesio --vcpus 4 --memory 4GiB --storage 20GiB",
        "serio vm run ardesio/web --image tiny --vcpus 1 --memory 256MiB --disk-size 1GiB",
        "serio vm list -o json",
        "serio vm console ardesio/web",
        "serio vm log ardesio/web",
        "serio vm stop ardesio/web --force",
        "serio vm stop ardesio/web --timeout 60s",
        "serio vm snapshot ardesio/web",
        "serio vm snapshot ardesio/web --name friday",
        "serio vm snapshot export ardesio/web@friday web.vm",
        "serio vm snapshot export vdcs/ardesio/vms/web/snapshots/friday -",
        "serio vm snapshot import - --vdc town-hall --name web2 --image tiny --new-macs",
        "serio volume snapshot ardesio/web-root --name before",
        "serio volume export ardesio/web-root --snapshot before",
        "serio volume delete-snapshot ardesio/web-root@before --async",
        "serio volume resize ardesio/data 20GiB",
        "serio volume clone ardesio/web-root@before ardesio/copy --size 2GiB",
        "serio volume rollback ardesio/web-root@before --discard-later",
        "serio volume flatten vdcs/ardesio/volumes/copy",
        "serio volume changes ardesio/web-root --from a --to b",
        "serio vdc snapshot ardesio --name monday --consistency app --require-app",
        "serio vdc snapshots ardesio",
        "serio vdc delete-snapshot ardesio monday",
        "serio operation list --running",
        "serio operation watch operations/x",
        "serio capacity -o json",
        "serio --host https://SCHEDULER node list",
        "serio events --follow",
        "serio pki init DIR --name CA",
        "serio pki issue DIR node-a --role node --host a --host 10.0.0.1 --days 9",
        "serio completion zsh",
        "serio man DIR",
    ] {
        parse(line).unwrap_or_else(|e| panic!("{line}: {e}"));
    }
}

#[test]
fn mistypes_exit_2() {
    for line in [
        "serio",
        "serio vm run web --image tiny",
        "serio vm run ardesio/Web --image tiny",
        "serio vm run ardesio/web",
        "serio vm run ardesio/web --image tiny --memory 4GB",
        "serio vm run ardesio/web --image tiny --nic bridge=br0",
        "serio vdc update ardesio",
        "serio volume create ardesio/data",
        "serio volume export ardesio/a --snapshot b --writable",
        "serio volume clone ardesio/web-root ardesio/copy",
        "serio volume resize ardesio/data",
        "serio vdc snapshot ardesio --name monday --require-app",
        "serio pki issue DIR ../x --role node",
        "serio pki issue DIR x --role root",
        "serio vm stop ardesio/web --timeout soon",
        "serio vm snapshot",
        "serio vm snapshot export ardesio/web web.vm",
        "serio vm snapshot export ardesio/web@friday",
        "serio vm snapshot import web.vm --vdc a/b",
        "serio completion tcsh",
    ] {
        let error = parse(line).expect_err(line);
        assert_eq!(error.exit_code(), 2, "{line}");
    }
}

#[test]
fn resource_names_are_understood() {
    assert_eq!(in_vdc("vdcs/ardesio/vms/web").unwrap().to_string(), "ardesio/web");
    assert_eq!(in_vdc("vdcs/ardesio/volumes/web-root").unwrap().to_string(), "ardesio/web-root");
    assert!(in_vdc("vdcs/ardesio/images/x").is_err());
    assert_eq!(vdc_name("vdcs/ardesio").unwrap().as_str(), "ardesio");
    assert_eq!(image_name("images/tiny").unwrap().as_str(), "tiny");
}

#[test]
fn times_and_cards() {
    assert_eq!("500ms".parse::<Seconds>().unwrap().0, Duration::from_millis(500));
    assert_eq!("5m".parse::<Seconds>().unwrap().0, Duration::from_secs(300));
    assert_eq!("7".parse::<Seconds>().unwrap().0, Duration::from_secs(7));
    for bad in ["", "s", "5x", "-1s", "99999999999999999999", "18446744073709551615h"] {
        assert!(bad.parse::<Seconds>().is_err(), "{bad}");
    }
    let nic: NicArg = "mac=52:54:00:00:00:01,address=10.0.0.2/24,gateway=10.0.0.1".parse().unwrap();
    assert_eq!((nic.mac.as_str(), nic.gateway.as_str()), ("52:54:00:00:00:01", "10.0.0.1"));
    assert_eq!("auto".parse::<NicArg>().unwrap(), NicArg::default());
    assert!("mac=".parse::<NicArg>().is_err());
    assert!("mac=a,mac=b".parse::<NicArg>().is_err());
}
