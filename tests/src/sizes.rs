//! STYLE rule 2 by machine: which files, functions and parameter lists of a source tree are too large.
//!
//! Owns: the limits, a reader of Rust source good enough for them (it follows strings, comments and braces, and is no
//! parser), and the allow-list. Pure: text in, findings out; `bin/tidy.rs` walks the tree.
//!
//! The allow-list may only shrink: an entry that no longer exceeds its limit is a finding too.

use std::{collections::BTreeMap, fmt};

/// Lines that a file may have.
pub const FILE_LINES_MAX: usize = 500;
/// Lines that a function's body may have, from its signature to its closing brace.
pub const FUNCTION_LINES_MAX: usize = 70;
/// Parameters of a function, the receiver not counted.
pub const PARAMETERS_MAX: usize = 6;

/// One thing that is too large.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// What is too large, as the allow-list spells it: `path` for a file, `path::function` for a function.
    pub subject: String,
    /// `lines` or `parameters`.
    pub measure: &'static str,
    /// How many there are.
    pub count: usize,
    /// How many there may be.
    pub max: usize,
    /// Where it starts, from 1.
    pub line: usize,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Finding { subject, measure, count, max, line } = self;
        write!(f, "{subject} (line {line}): {count} {measure}, at most {max}")
    }
}

/// What exceeds a limit in one file.
pub fn measure(path: &str, text: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let lines = text.lines().count();
    if lines > FILE_LINES_MAX {
        findings.push(Finding {
            subject: path.to_owned(),
            measure: "lines",
            count: lines,
            max: FILE_LINES_MAX,
            line: 1,
        });
    }
    if path.ends_with(".rs") {
        for function in functions(&blank(text)) {
            let subject = format!("{path}::{}", function.name);
            let line = function.line;
            let mut check = |measure, count, max| {
                if count > max {
                    findings.push(Finding { subject: subject.clone(), measure, count, max, line });
                }
            };
            check("lines", function.lines, FUNCTION_LINES_MAX);
            check("parameters", function.parameters, PARAMETERS_MAX);
        }
    }
    findings
}

/// Compares findings with the allow-list: what is left to complain about, as lines for a person.
pub fn judge(findings: &[Finding], allow_list: &str) -> Vec<String> {
    let mut allowed: BTreeMap<&str, bool> = allow_list
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(|line| (line, false))
        .collect();
    let mut complaints = Vec::new();
    for finding in findings {
        match allowed.get_mut(finding.subject.as_str()) {
            Some(used) => *used = true,
            None => complaints.push(finding.to_string()),
        }
    }
    let idle = allowed.iter().filter(|(_, used)| !**used);
    complaints.extend(
        idle.map(|(subject, _)| format!("{subject}: no longer too large, take it off the allow-list")),
    );
    complaints
}

#[derive(Debug)]
struct Function {
    name: String,
    line: usize,
    lines: usize,
    parameters: usize,
}

/// The source with what is in strings, characters and comments replaced by spaces, line by line.
fn blank(text: &str) -> String {
    let source: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < source.len() {
        let end = skip_opaque(&source, at);
        if end == at {
            out.push(source[at]);
            at += 1;
        } else {
            out.extend(source[at..end].iter().map(|c| if *c == '\n' { '\n' } else { ' ' }));
            at = end;
        }
    }
    out
}

/// The end of the comment, string or character that starts at `at`; `at` itself when none does.
fn skip_opaque(source: &[char], at: usize) -> usize {
    let get = |i: usize| source.get(i).copied().unwrap_or('\0');
    match (get(at), get(at + 1)) {
        ('/', '/') => find(source, at, "\n").unwrap_or(source.len()),
        ('/', '*') => find(source, at + 2, "*/").map_or(source.len(), |end| end + 2),
        ('"', _) => quoted(source, at, '"'),
        ('\'', '\\') => quoted(source, at, '\''),
        ('\'', c) if c != '\'' && get(at + 2) == '\'' => at + 3,
        ('r', '"' | '#')
            if at == 0 || !(get(at - 1).is_alphanumeric() || get(at - 1) == '_') || get(at - 1) == 'b' =>
        {
            let hashes = source[at + 1..].iter().take_while(|c| **c == '#').count();
            if get(at + 1 + hashes) != '"' {
                return at;
            }
            let close = format!("\"{}", "#".repeat(hashes));
            find(source, at + 2 + hashes, &close).map_or(source.len(), |end| end + close.len())
        }
        _ => at,
    }
}

fn quoted(source: &[char], at: usize, quote: char) -> usize {
    let mut i = at + 1;
    while let Some(c) = source.get(i) {
        match c {
            '\\' => i += 2,
            c if *c == quote => return i + 1,
            _ => i += 1,
        }
    }
    source.len()
}

fn find(source: &[char], from: usize, what: &str) -> Option<usize> {
    let what: Vec<char> = what.chars().collect();
    (from..source.len()).find(|i| source[*i..].starts_with(&what))
}

/// The functions of a blanked source that have a body.
fn functions(source: &str) -> Vec<Function> {
    let mut found = Vec::new();
    for (at, _) in source.match_indices("fn ") {
        let word_before = source[..at].chars().next_back().is_some_and(|c| c.is_alphanumeric() || c == '_');
        let rest = &source[at + 3..];
        let name: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        if word_before || name.is_empty() {
            continue;
        }
        let Some((parameters, after)) = parameters(rest) else { continue };
        let Some(body) = body_lines(&rest[after..]) else { continue };
        let line = source[..at].matches('\n').count() + 1;
        let lines = rest[..after].matches('\n').count() + body;
        found.push(Function { name, line, lines, parameters });
    }
    found
}

/// Counts the parameters that follow a function's name, and where their list ends.
fn parameters(rest: &str) -> Option<(usize, usize)> {
    let (mut depth, mut count, mut opened) = (0_i32, 0, false);
    let mut current = String::new();
    let mut before = ' ';
    for (at, c) in rest.char_indices() {
        match c {
            // `<` and `>` before the list belong to the generics; inside it they nest, and `->` is no bracket.
            '(' | '[' | '<' | '{' => {
                opened |= c == '(' && depth == 0;
                depth += 1;
            }
            '>' if before == '-' => {}
            ')' | ']' | '>' | '}' => {
                depth -= 1;
                if depth == 0 && c == ')' && opened {
                    return Some((count + usize::from(is_parameter(&current)), at + 1));
                }
            }
            ',' if depth == 1 && opened => {
                count += usize::from(is_parameter(&current));
                current.clear();
            }
            ';' if depth == 0 => return None,
            _ if opened => current.push(c),
            _ => {}
        }
        before = c;
    }
    None
}

/// Whether that is one: not the receiver, not the nothing behind a last comma, not an input of proptest (`a in strategy`).
fn is_parameter(text: &str) -> bool {
    let text = text.trim();
    !text.is_empty() && !text.ends_with("self") && !text.contains(" in ")
}

/// The lines of the body that follows a signature; none for a declaration.
fn body_lines(rest: &str) -> Option<usize> {
    let open = rest.find(['{', ';'])?;
    if rest[open..].starts_with(';') {
        return None;
    }
    let mut depth = 0_i32;
    for (at, c) in rest[open..].char_indices() {
        depth += match c {
            '{' => 1,
            '}' => -1,
            _ => 0,
        };
        if depth == 0 {
            return Some(rest[..open + at].matches('\n').count() + 1);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_function_is_found_and_braces_in_text_do_not_count() {
        let body = "    let a = \"}\"; // }\n".repeat(71);
        let text = format!("fn short() {{}}\nfn long<T>(a: u8) -> Vec<T> {{\n{body}}}\n");
        let findings = measure("a.rs", &text);
        assert_eq!(findings.len(), 1, "{findings:?}");
        assert_eq!(
            (findings[0].subject.as_str(), findings[0].line, findings[0].count),
            ("a.rs::long", 2, 73)
        );
    }

    #[test]
    fn parameters_are_counted_without_the_receiver() {
        let text = "fn m(&mut self, a: Map<u8, u8>, b: u8, c: fn(u8, u8) -> u8, d: (u8, u8), e: u8, f: u8) {}\n\
                    fn p(a in any(), b in any(), c in 0..1, d in any(), e in any(), f in any(), g in any()) {}\n\
                    fn n(a: u8, b: u8, c: u8, d: u8, e: u8, f: u8, g: u8,) {}\n";
        let findings = measure("a.rs", text);
        assert_eq!(findings.len(), 1, "{findings:?}");
        assert_eq!((findings[0].subject.as_str(), findings[0].count), ("a.rs::n", 7));
    }

    #[test]
    fn the_allow_list_may_only_shrink() {
        let long = "x\n".repeat(501);
        let findings = measure("a.rs", &long);
        assert!(judge(&findings, "# why\na.rs\n").is_empty());
        assert_eq!(judge(&findings, "").len(), 1);
        assert_eq!(judge(&[], "a.rs\n").len(), 1);
    }
}
