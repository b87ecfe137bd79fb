//! Words, as GRUB's scripts have them: much like a shell's.

use super::GrubError;

/// A part of a word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Piece {
    /// Itself. `quoted`: it is no keyword, and empty it still makes a word.
    Text { text: String, quoted: bool },
    /// A variable's value; split at spaces unless `quoted`.
    Variable { name: String, quoted: bool },
}

/// Pieces without a space between them.
pub(super) type Word = Vec<Piece>;

/// What a script is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Token {
    Word(Word),
    /// The end of a command: a line's end or `;`.
    End,
}

/// Words of a script.
const TOKENS_MAX: usize = 200_000;

struct Lexer<'a> {
    rest: std::iter::Peekable<std::str::Chars<'a>>,
    line: u32,
    tokens: Vec<(Token, u32)>,
    word: Word,
    text: String,
}

/// Whether a word is just that, unquoted.
pub(super) fn is_plain(word: &Word, text: &str) -> bool {
    matches!(word.as_slice(), [Piece::Text { text: found, quoted: false }] if found == text)
}

/// Splits a script; each token with its line.
pub(super) fn tokens(script: &str) -> Result<Vec<(Token, u32)>, GrubError> {
    let mut lexer = Lexer {
        rest: script.chars().peekable(),
        line: 1,
        tokens: Vec::new(),
        word: Word::new(),
        text: String::new(),
    };
    lexer.run()?;
    Ok(lexer.tokens)
}

impl Lexer<'_> {
    fn next(&mut self) -> Option<char> {
        let next = self.rest.next();
        self.line += u32::from(next == Some('\n'));
        next
    }

    fn error(&self, what: &'static str) -> GrubError {
        GrubError::Syntax { line: self.line, what }
    }

    fn end_text(&mut self, quoted: bool) {
        let text = std::mem::take(&mut self.text);
        if quoted || !text.is_empty() {
            self.word.push(Piece::Text { text, quoted });
        }
    }

    fn end_word(&mut self) {
        self.end_text(false);
        if !self.word.is_empty() {
            let word = std::mem::take(&mut self.word);
            self.tokens.push((Token::Word(word), self.line));
        }
    }

    fn end_command(&mut self) {
        self.end_word();
        if !matches!(self.tokens.last(), None | Some((Token::End, _))) {
            self.tokens.push((Token::End, self.line));
        }
    }

    fn run(&mut self) -> Result<(), GrubError> {
        while let Some(next) = self.next() {
            if self.tokens.len() > TOKENS_MAX {
                return Err(GrubError::Bound("has too many words"));
            }
            match next {
                '\n' | ';' => self.end_command(),
                ' ' | '\t' | '\r' => self.end_word(),
                '#' if self.word.is_empty() && self.text.is_empty() => {
                    while self.rest.peek().is_some_and(|c| *c != '\n') {
                        self.next();
                    }
                }
                '\\' => match self.next() {
                    Some('\n') | None => {}
                    Some(escaped) => self.text.push(escaped),
                },
                '\'' => {
                    self.end_text(false);
                    self.until_quote()?;
                }
                '"' => {
                    self.end_text(false);
                    self.double_quoted()?;
                }
                '$' => self.variable(false)?,
                other => self.text.push(other),
            }
        }
        self.end_command();
        Ok(())
    }

    fn until_quote(&mut self) -> Result<(), GrubError> {
        loop {
            match self.next() {
                Some('\'') => break,
                Some(other) => self.text.push(other),
                None => return Err(self.error("a quote is not closed")),
            }
        }
        self.end_text(true);
        Ok(())
    }

    fn double_quoted(&mut self) -> Result<(), GrubError> {
        loop {
            match self.next() {
                Some('"') => break,
                Some('\\') => match self.next() {
                    Some(escaped @ ('"' | '\\' | '$')) => self.text.push(escaped),
                    Some('\n') => {}
                    Some(other) => self.text.extend(['\\', other]),
                    None => return Err(self.error("a quote is not closed")),
                },
                Some('$') => self.variable(true)?,
                Some(other) => self.text.push(other),
                None => return Err(self.error("a quote is not closed")),
            }
        }
        self.end_text(true);
        Ok(())
    }

    /// What follows a `$`; the sign itself if nothing does that names something.
    fn variable(&mut self, quoted: bool) -> Result<(), GrubError> {
        let name = match self.rest.peek().copied() {
            Some('{') => {
                self.next();
                let mut name = String::new();
                loop {
                    match self.next() {
                        Some('}') => break name,
                        Some(other) if other != '\n' => name.push(other),
                        _ => return Err(self.error("a `${` is not closed")),
                    }
                }
            }
            Some(special @ ('?' | '@' | '*' | '#' | '0'..='9')) => {
                self.next();
                special.to_string()
            }
            Some(first) if first.is_ascii_alphabetic() || first == '_' => {
                let mut name = String::new();
                while let Some(next) = self.rest.peek().filter(|c| c.is_ascii_alphanumeric() || **c == '_') {
                    name.push(*next);
                    self.next();
                }
                name
            }
            _ => {
                self.text.push('$');
                return Ok(());
            }
        };
        self.end_text(quoted);
        self.word.push(Piece::Variable { name, quoted });
        Ok(())
    }
}
