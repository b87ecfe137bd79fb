//! Loader entries: what they say, and their order.

use proptest::prelude::*;

use crate::bls::{BlsEntry, default_pattern, matches, order, parse};

fn entry(name: &str, text: &str) -> BlsEntry {
    parse(name, text).expect("an entry")
}

#[test]
fn an_entry_says_what_it_says() {
    let text = "# Fedora\ntitle Fedora Linux (6.5.6-300.fc39.x86_64) 39\nversion 6.5.6-300.fc39.x86_64\n\
                linux /vmlinuz-6.5.6-300.fc39.x86_64\ninitrd\t/initramfs-6.5.6.img  $tuned_initrd\r\n\
                options root=UUID=1 ro\noptions rhgb quiet\ngrub_users $grub_users\n  sort-key fedora\n";
    let found = entry("1234-6.5.6.conf", text);
    assert_eq!((found.id.as_str(), found.bad, found.efi), ("1234-6.5.6", false, false));
    assert_eq!(found.name(), "Fedora Linux (6.5.6-300.fc39.x86_64) 39");
    assert_eq!(found.linux, "/vmlinuz-6.5.6-300.fc39.x86_64");
    assert_eq!(found.initrds, ["/initramfs-6.5.6.img", "$tuned_initrd"]);
    assert_eq!((found.options.as_str(), found.sort_key.as_str()), ("root=UUID=1 ro rhgb quiet", "fedora"));
    assert!(parse(".conf", "").is_none());
    assert!(entry("a.conf", "efi /EFI/x.efi\narchitecture aa64").efi);
    assert!(!entry("a.conf", "architecture aa64").fits());
    assert!(entry("a.conf", "architecture X64").fits());
}

#[test]
fn attempts_are_counted_in_the_name() {
    for (name, id, bad) in [
        ("new+3.conf", "new", false),
        ("new+2-1.conf", "new", false),
        ("new+0-3.conf", "new", true),
        ("c++.conf", "c++", false),
        ("a+b.conf", "a+b", false),
    ] {
        let found = entry(name, "linux /k");
        assert_eq!((found.id.as_str(), found.bad), (id, bad), "{name}");
    }
}

#[test]
fn the_newest_comes_first_and_the_bad_last() {
    let mut all = [
        entry("debian-6.1.0-9.conf", "linux /k"),
        entry("debian-6.1.0-18.conf", "linux /k"),
        entry("debian-7+0.conf", "linux /k"),
        entry("x.conf", "linux /k\nsort-key debian\nmachine-id 1\nversion 5.10"),
        entry("y.conf", "linux /k\nsort-key debian\nmachine-id 1\nversion 6.1~rc1"),
        entry("z.conf", "linux /k\nsort-key debian\nmachine-id 1\nversion 6.1"),
        entry("w.conf", "linux /k\nsort-key arch"),
    ];
    all.sort_by(order);
    let ids: Vec<_> = all.iter().map(|entry| entry.id.as_str()).collect();
    assert_eq!(ids, ["w", "z", "y", "x", "debian-6.1.0-18", "debian-6.1.0-9", "debian-7"]);
}

#[test]
fn a_default_is_a_pattern() {
    assert_eq!(default_pattern("timeout 3\ndefault debian-*.conf\n"), Some("debian-*".to_owned()));
    assert_eq!(default_pattern("default @saved"), None);
    assert_eq!(default_pattern("#default a"), None);
    for (pattern, name, fits) in [
        ("debian-*", "debian-6", true),
        ("*", "", true),
        ("a?c", "abc", true),
        ("a*c*", "abcd", true),
        ("a*d", "abc", false),
        ("", "a", false),
    ] {
        assert_eq!(matches(pattern, name), fits, "{pattern} {name}");
    }
}

proptest! {
    #[test]
    fn any_text_is_read(name in ".{0,40}", text in "(?s).{0,300}") {
        let _ = parse(&name, &text);
        let _ = default_pattern(&text);
    }

    #[test]
    fn the_order_is_one(a in "[a-z0-9+.-]{1,9}", b in "[a-z0-9+.-]{1,9}", keys in "[ab]?[ab]?") {
        let of = |name: &str, key: &str| entry(&format!("{name}.conf"), &format!("linux /k\nsort-key {key}"));
        let (a, b) = (of(&a, keys.get(..1).unwrap_or("")), of(&b, keys.get(1..).unwrap_or("")));
        prop_assert_eq!(order(&a, &b), order(&b, &a).reverse());
    }

    #[test]
    fn patterns_end(pattern in "[a*?]{0,12}", name in "[ab]{0,24}") {
        let _ = matches(&pattern, &name);
    }
}
