//! grubenv: `name=value` lines between a signature and `#`s, of 1024 bytes in all.

/// The variables. Lines that make no sense are left out.
pub(crate) fn environment(bytes: &[u8]) -> Vec<(String, String)> {
    let text = String::from_utf8_lossy(bytes);
    let Some(lines) = text.strip_prefix("# GRUB Environment Block\n") else { return Vec::new() };
    let pair = |line: &str| {
        let (name, value) = line.split_once('=')?;
        let plain = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        plain.then(|| (name.to_owned(), value.replace("\\\\", "\\")))
    };
    lines.lines().filter(|line| !line.starts_with('#')).filter_map(pair).collect()
}

/// Longest text that is made.
const TEXT_BYTES_MAX: usize = 16 * 1024;

/// Puts the values of `$name` and `${name}` in; nothing for what has none.
pub(crate) fn expand(text: &str, values: &[(String, String)]) -> String {
    let mut expanded = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        expanded.push_str(before);
        let braced = after.strip_prefix('{').and_then(|inner| inner.split_once('}'));
        let (name, behind) = braced.unwrap_or_else(|| {
            let end = after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(after.len());
            after.split_at(end)
        });
        let value = values.iter().find(|(known, _)| known == name).map_or("", |(_, value)| value);
        expanded.push_str(value);
        rest = behind;
        if expanded.len() > TEXT_BYTES_MAX {
            break;
        }
    }
    expanded.push_str(rest);
    while expanded.len() > TEXT_BYTES_MAX {
        expanded.pop();
    }
    expanded
}
