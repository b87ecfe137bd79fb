//! The order of versions: the Version Format Specification of the UAPI group, which the Boot Loader Specification uses.

use std::cmp::Ordering;

fn is_part(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'~' | b'-' | b'^' | b'.')
}

fn rest(bytes: &[u8], from: usize) -> &[u8] {
    bytes.get(from..).unwrap_or_default()
}

fn skip(bytes: &[u8], what: impl Fn(u8) -> bool) -> &[u8] {
    rest(bytes, bytes.iter().take_while(|byte| what(**byte)).count())
}

/// Which of the two is the newer version; `Greater`: the first.
pub(crate) fn compare(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    loop {
        // 1. What is no part of a version is skipped.
        a = skip(a, |byte| !is_part(byte));
        b = skip(b, |byte| !is_part(byte));
        // 2. `~` is older than anything, also than the end.
        match (a.first() == Some(&b'~'), b.first() == Some(&b'~')) {
            (true, true) => {
                (a, b) = (rest(a, 1), rest(b, 1));
                continue;
            }
            (true, false) => return Ordering::Less,
            (false, true) => return Ordering::Greater,
            (false, false) => {}
        }
        // 3. The end is older than anything else.
        if a.is_empty() || b.is_empty() {
            return a.len().cmp(&b.len());
        }
        // 4. to 6. Separators, each newer than the one before: `-`, `^`, `.`; a version that has one there is older.
        let mut both = false;
        for separator in [b'-', b'^', b'.'] {
            match (a.first() == Some(&separator), b.first() == Some(&separator)) {
                (true, true) => {
                    (a, b) = (rest(a, 1), rest(b, 1));
                    both = true;
                    break;
                }
                (true, false) => return Ordering::Less,
                (false, true) => return Ordering::Greater,
                (false, false) => {}
            }
        }
        if both {
            continue;
        }
        // 7. Numbers by value, and newer than letters; letters by their bytes, capitals first.
        let digits = |byte: u8| byte.is_ascii_digit();
        let letters = |byte: u8| byte.is_ascii_alphabetic();
        let numeric = a.first().is_some_and(u8::is_ascii_digit) || b.first().is_some_and(u8::is_ascii_digit);
        let (rest_a, rest_b) =
            if numeric { (skip(a, digits), skip(b, digits)) } else { (skip(a, letters), skip(b, letters)) };
        let part_a = a.get(..a.len().saturating_sub(rest_a.len())).unwrap_or_default();
        let part_b = b.get(..b.len().saturating_sub(rest_b.len())).unwrap_or_default();
        let order = if numeric {
            if part_a.is_empty() != part_b.is_empty() {
                return part_b.is_empty().cmp(&part_a.is_empty());
            }
            let (part_a, part_b) = (skip(part_a, |byte| byte == b'0'), skip(part_b, |byte| byte == b'0'));
            part_a.len().cmp(&part_b.len()).then_with(|| part_a.cmp(part_b))
        } else {
            part_a.cmp(part_b)
        };
        if order != Ordering::Equal {
            return order;
        }
        (a, b) = (rest_a, rest_b);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_examples_of_the_specification_hold() {
        for (a, b) in [
            ("11", "systemd-123"),
            ("bar-123", "foo-123"),
            ("123-a", "123a"),
            ("123a", "123b"),
            ("123-3", "123.3"),
            ("6.1.0-9-amd64", "6.1.0-18-amd64"),
            ("6.1.0-18", "6.1.0-18-amd64"),
            ("1.0~rc1", "1.0"),
            ("122.1", "123"),
            ("122.1", "123.1"),
            ("123-a.1", "123a-3"),
            ("A", "a"),
            ("1", "1.0"),
        ] {
            let (a, b) = if a == "11" { (b, a) } else { (a, b) };
            assert_eq!(compare(a, b), Ordering::Less, "{a} < {b}");
            assert_eq!(compare(b, a), Ordering::Greater, "{b} > {a}");
            assert_eq!(compare(a, a), Ordering::Equal);
        }
        assert_eq!(compare("007", "7"), Ordering::Equal);
    }

    proptest::proptest! {
        #[test]
        fn it_is_an_order(a in "[a-zA-Z0-9~^.+ -]{0,9}", b in "[a-zA-Z0-9~^.+ -]{0,9}", c in "[a-zA-Z0-9~^.+ -]{0,9}") {
            proptest::prop_assert_eq!(compare(&a, &b), compare(&b, &a).reverse());
            if compare(&a, &b).is_le() && compare(&b, &c).is_le() {
                proptest::prop_assert!(compare(&a, &c).is_le());
            }
        }
    }
}
