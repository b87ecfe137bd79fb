//! `test` and `[`: comparisons of words, and questions about files.

/// Says whether a file is there, and its size.
pub(super) type Sizes<'a> = &'a dyn Fn(&str) -> Option<u64>;

/// The value of an expression: `!` binds closest, then `-a`, then `-o`.
pub(super) fn evaluate(words: &[String], sizes: Sizes<'_>) -> bool {
    words.split(|word| word == "-o").any(|part| {
        let mut all = part.split(|word| word == "-a");
        all.all(|part| term(part, sizes))
    })
}

fn term(words: &[String], sizes: Sizes<'_>) -> bool {
    let words: Vec<&str> =
        words.iter().map(String::as_str).filter(|word| !matches!(*word, "(" | ")")).collect();
    match words.as_slice() {
        ["!", rest @ ..] if !rest.is_empty() => {
            !term(&rest.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>(), sizes)
        }
        [text] => !text.is_empty(),
        ["-n", text] => !text.is_empty(),
        ["-z", text] => text.is_empty(),
        ["-s", path] => sizes(path).is_some_and(|bytes| bytes > 0),
        ["-f" | "-e", path] => sizes(path).is_some(),
        // Directories are not asked for by what matters here.
        ["-d", _] => true,
        [a, operator, b] => compare(a, operator, b),
        _ => false,
    }
}

fn compare(a: &str, operator: &str, b: &str) -> bool {
    let number = |text: &str| text.trim().parse::<i64>().unwrap_or_default();
    match operator {
        "=" | "==" => a == b,
        "!=" => a != b,
        "<" => a < b,
        ">" => a > b,
        "<=" => a <= b,
        ">=" => a >= b,
        "-eq" => number(a) == number(b),
        "-ne" => number(a) != number(b),
        "-lt" => number(a) < number(b),
        "-le" => number(a) <= number(b),
        "-gt" => number(a) > number(b),
        "-ge" => number(a) >= number(b),
        _ => false,
    }
}
