//! Lists, page by page. A page begins after the last item of the one before, wherever that is now: what is made or deleted
//! meanwhile neither repeats nor hides another item.

use crate::error::Error;

/// The longest token that is looked at: a key is names and numbers.
const TOKEN_BYTES_MAX: usize = 512;

/// A page of items in the order of their keys, and the token of the next one; empty after the last. `size` 0: all.
pub(super) fn cut<T>(
    mut items: Vec<T>,
    size: u32,
    token: &str,
    key: impl Fn(&T) -> String,
) -> Result<(Vec<T>, String), Error> {
    if token.len() > TOKEN_BYTES_MAX {
        return Err(Error::invalid("page_token", "is not one that this call gave"));
    }
    items.sort_by_cached_key(&key);
    if !token.is_empty() {
        items.retain(|item| key(item).as_str() > token);
    }
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    if size == 0 || items.len() <= size {
        return Ok((items, String::new()));
    }
    items.truncate(size);
    let next = items.last().map(key).unwrap_or_default();
    Ok((items, next))
}

/// A key by which the newest comes first.
pub(super) fn newest_first(number: u128) -> String {
    format!("{:032x}", u128::MAX - number)
}

/// A key by which the oldest comes first.
pub(super) fn oldest_first(time_ms: i64, name: &str) -> String {
    format!("{:020}/{name}", time_ms.max(0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(item: &u32) -> String {
        format!("{item:05}")
    }

    #[test]
    fn all_when_nothing_is_said() {
        assert_eq!(cut(vec![3, 1, 2], 0, "", key).unwrap(), (vec![1, 2, 3], String::new()));
        assert!(cut(vec![1], 0, &"x".repeat(1000), key).is_err());
        assert!(newest_first(2) < newest_first(1));
        assert!(oldest_first(9, "b") < oldest_first(10, "a"));
    }

    proptest! {
        #[test]
        fn pages_are_the_list(
            items in prop::collection::btree_set(0_u32..500, 0..60), size in 1_u32..10, gone in 0_u32..500
        ) {
            let mut items = items;
            let mut token = String::new();
            let mut seen = Vec::new();
            let all = items.clone();
            loop {
                let (page, next) = cut(items.iter().copied().collect(), size, &token, key).unwrap();
                prop_assert!(page.len() <= size as usize);
                seen.extend(page);
                if next.is_empty() {
                    break;
                }
                token = next;
                // What goes between two pages takes nothing else with it.
                items.remove(&gone);
            }
            let missing: Vec<_> = all.into_iter().filter(|item| !seen.contains(item)).collect();
            prop_assert!(missing.iter().all(|item| *item == gone), "{missing:?}");
            prop_assert!(seen.windows(2).all(|two| two[0] < two[1]));
        }
    }
}
