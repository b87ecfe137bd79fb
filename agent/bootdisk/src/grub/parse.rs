//! Statements out of words.

use std::rc::Rc;

use super::{
    GrubError,
    lexer::{Piece, Token, Word, is_plain, tokens},
};

/// Statements within statements.
const DEPTH_MAX: u32 = 32;

/// A statement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Statement {
    Command(Vec<Word>),
    If {
        arms: Vec<(Block, Block)>,
        otherwise: Block,
    },
    For {
        name: String,
        words: Vec<Word>,
        body: Block,
    },
    Function {
        name: String,
        body: Block,
    },
    /// `menuentry` or `submenu` with its arguments.
    Menu {
        words: Vec<Word>,
        body: Block,
        submenu: bool,
    },
}

/// Shared, because menu entries and functions keep theirs.
pub(super) type Block = Rc<Vec<Statement>>;

struct Parser {
    tokens: std::iter::Peekable<std::vec::IntoIter<(Token, u32)>>,
    line: u32,
    depth: u32,
}

/// Parses a script.
pub(super) fn parse(script: &str) -> Result<Block, GrubError> {
    let mut parser = Parser { tokens: tokens(script)?.into_iter().peekable(), line: 1, depth: 0 };
    Ok(parser.block(&[])?.0)
}

impl Parser {
    fn error(&self, what: &'static str) -> GrubError {
        GrubError::Syntax { line: self.line, what }
    }

    fn next(&mut self) -> Option<Token> {
        let (token, line) = self.tokens.next()?;
        self.line = line;
        Some(token)
    }

    /// Statements up to one of these words (which one: its index), or to the script's end if there are none.
    fn block(&mut self, until: &[&str]) -> Result<(Block, usize), GrubError> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(GrubError::Bound("nests too deep"));
        }
        let mut statements = Vec::new();
        let end = loop {
            match self.next() {
                None if until.is_empty() => break 0,
                None => return Err(self.error("something is not closed")),
                Some(Token::End) => {}
                Some(Token::Word(word)) => {
                    if let Some(end) = until.iter().position(|end| is_plain(&word, end)) {
                        break end;
                    }
                    statements.extend(self.statement(word)?);
                }
            }
        };
        self.depth -= 1;
        Ok((Rc::new(statements), end))
    }

    fn statement(&mut self, first: Word) -> Result<Option<Statement>, GrubError> {
        let plain = match first.as_slice() {
            [Piece::Text { text, quoted: false }] => text.clone(),
            _ => String::new(),
        };
        match plain.as_str() {
            "if" => self.conditional().map(Some),
            "for" => self.for_loop().map(Some),
            "while" | "until" => {
                self.block(&["do"])?;
                self.block(&["done"])?;
                Ok(None)
            }
            "function" => {
                let (words, opens) = self.words()?;
                let name = match words.first().map(Vec::as_slice) {
                    Some([Piece::Text { text, .. }]) if opens => text.clone(),
                    _ => return Err(self.error("a function needs a name and a body")),
                };
                Ok(Some(Statement::Function { name, body: self.block(&["}"])?.0 }))
            }
            "menuentry" | "submenu" => {
                let (words, opens) = self.words()?;
                // Without a body it reads a file: nothing that is used.
                let body = if opens { self.block(&["}"])?.0 } else { Block::default() };
                Ok(Some(Statement::Menu { words, body, submenu: plain == "submenu" }))
            }
            "{" => {
                let body = self.block(&["}"])?.0;
                Ok(Some(Statement::If { arms: Vec::new(), otherwise: body }))
            }
            _ => {
                let mut words = vec![first];
                let (more, opens) = self.words()?;
                words.extend(more);
                if opens {
                    self.block(&["}"])?;
                }
                Ok(Some(Statement::Command(words)))
            }
        }
    }

    /// The words of a command, and whether a `{` follows them.
    fn words(&mut self) -> Result<(Vec<Word>, bool), GrubError> {
        let mut words = Vec::new();
        loop {
            match self.tokens.peek() {
                Some((Token::Word(word), _)) if is_plain(word, "}") => return Ok((words, false)),
                None => return Ok((words, false)),
                Some(_) => {}
            }
            match self.next() {
                Some(Token::Word(word)) if is_plain(&word, "{") => return Ok((words, true)),
                Some(Token::Word(word)) => words.push(word),
                Some(Token::End) => {
                    // A body may begin on the next line.
                    let opens =
                        matches!(self.tokens.peek(), Some((Token::Word(word), _)) if is_plain(word, "{"));
                    if opens {
                        self.next();
                    }
                    return Ok((words, opens));
                }
                None => return Ok((words, false)),
            }
        }
    }

    fn conditional(&mut self) -> Result<Statement, GrubError> {
        let mut arms = Vec::new();
        loop {
            let condition = self.block(&["then"])?.0;
            let (body, end) = self.block(&["elif", "else", "fi"])?;
            arms.push((condition, body));
            match end {
                0 => {}
                1 => return Ok(Statement::If { arms, otherwise: self.block(&["fi"])?.0 }),
                _ => return Ok(Statement::If { arms, otherwise: Block::default() }),
            }
        }
    }

    fn for_loop(&mut self) -> Result<Statement, GrubError> {
        let (mut words, _) = self.words()?;
        let wrong = self.error("a `for` needs a name and `in`");
        let name = match words.first().map(Vec::as_slice) {
            Some([Piece::Text { text, .. }]) if words.get(1).is_some_and(|word| is_plain(word, "in")) => {
                text.clone()
            }
            _ => return Err(wrong),
        };
        words.drain(..2);
        // The word that begins the body.
        if !self.block(&["do"])?.0.is_empty() {
            return Err(self.error("a `for` needs `do`"));
        }
        Ok(Statement::For { name, words, body: self.block(&["done"])?.0 })
    }
}
