//! Runs a script: variables, functions, the menu, and then the entry that the menu boots by itself.

use std::{collections::BTreeMap, rc::Rc};

use super::{
    GrubError, conditions, environment,
    lexer::{Piece, Word},
    parse::{Block, Statement, parse},
};

/// Commands that one search runs.
const STEPS_MAX: u32 = 200_000;
/// Longest value of a variable and of a word.
const VALUE_BYTES_MAX: usize = 16 * 1024;
/// Functions, menus and files within one another.
const DEPTH_MAX: u32 = 24;
const ENTRIES_MAX: usize = 4096;

/// What `search` looks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Search {
    /// A file system's UUID.
    Uuid,
    /// Its label.
    Label,
    /// A file in it.
    File,
}

/// What a script sees of the disk. Devices are named as GRUB does: `hd0,gpt1`.
pub(crate) trait Host {
    /// A small file's content.
    fn read(&self, device: &str, path: &str) -> Option<Vec<u8>>;
    /// A file's size.
    fn size(&self, device: &str, path: &str) -> Option<u64>;
    /// The device with something.
    fn search(&self, by: Search, what: &str) -> Option<String>;
}

/// A file as a script names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) device: String,
    pub(crate) path: String,
}

/// What an entry loads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chosen {
    pub(crate) title: String,
    pub(crate) kernel: Place,
    pub(crate) initrds: Vec<Place>,
    pub(crate) cmdline: String,
}

#[derive(Debug, Clone)]
struct Item {
    title: String,
    id: String,
    words: Vec<String>,
    body: Block,
    submenu: bool,
}

/// A script that runs.
pub(crate) struct Grub<'a> {
    host: &'a dyn Host,
    variables: BTreeMap<String, String>,
    functions: BTreeMap<String, Block>,
    menu: Vec<Item>,
    kernel: Option<(Place, String)>,
    initrds: Vec<Place>,
    /// It asked for the entries of the Boot Loader Specification.
    pub(crate) blscfg: bool,
    steps: u32,
    depth: u32,
    /// A `return` unwinds the function or the file.
    returning: bool,
}

impl<'a> Grub<'a> {
    /// A GRUB of a PC that found its files in that directory.
    pub(crate) fn new(host: &'a dyn Host, device: &str, directory: &str) -> Self {
        let mut variables = BTreeMap::new();
        let known = [
            ("root", device.to_owned()),
            ("prefix", format!("({device}){directory}")),
            ("config_directory", format!("({device}){directory}")),
            ("cmdpath", format!("({device})")),
            ("grub_platform", "pc".to_owned()),
            ("grub_cpu", "i386".to_owned()),
            ("menuentry_id_option", "--id".to_owned()),
        ];
        variables.extend(known.map(|(name, value)| (name.to_owned(), value)));
        let features = [
            "menuentry_id",
            "menuentry_options",
            "timeout_style",
            "platform_search_hint",
            "200_final",
            "all_video_module",
        ];
        variables.extend(features.map(|name| (format!("feature_{name}"), "y".to_owned())));
        Self {
            host,
            variables,
            functions: BTreeMap::new(),
            menu: Vec::new(),
            kernel: None,
            initrds: Vec::new(),
            blscfg: false,
            steps: 0,
            depth: 0,
            returning: false,
        }
    }

    /// Runs a script.
    pub(crate) fn run(&mut self, script: &str) -> Result<(), GrubError> {
        let block = parse(script)?;
        self.block(&block)?;
        self.returning = false;
        Ok(())
    }

    /// A variable's value; empty when it has none.
    pub(crate) fn variable(&self, name: &str) -> &str {
        self.variables.get(name).map_or("", String::as_str)
    }

    /// All of them.
    pub(crate) fn variables(&self) -> Vec<(String, String)> {
        self.variables.iter().map(|(name, value)| (name.clone(), value.clone())).collect()
    }

    /// The entry that is booted when nobody touches a key.
    pub(crate) fn boot(&mut self) -> Result<Chosen, GrubError> {
        let mut path = self.variable("default").to_owned();
        if path.is_empty() {
            path = "0".to_owned();
        }
        let mut title = String::new();
        // Each level is one part of `default`; the rest names something in the submenu.
        for _ in 0..DEPTH_MAX {
            let (part, rest) = path
                .split_once('>')
                .map_or((path.clone(), String::new()), |(a, b)| (a.to_owned(), b.to_owned()));
            let Some(item) = self.pick(&path, &part).cloned() else { return Err(GrubError::Nothing) };
            title = item.title.clone();
            self.menu.clear();
            self.positional(&item.words);
            self.block(&item.body)?;
            self.returning = false;
            if !item.submenu {
                break;
            }
            path = rest;
        }
        let (kernel, cmdline) = self.kernel.take().ok_or(GrubError::Nothing)?;
        Ok(Chosen { title, kernel, initrds: std::mem::take(&mut self.initrds), cmdline })
    }

    /// As GRUB's `get_entry_number`: a number counts from 0; else an id or a title; the first if there is no such.
    fn pick(&self, whole: &str, part: &str) -> Option<&Item> {
        let by_number = part.parse::<usize>().ok().and_then(|index| self.menu.get(index));
        // A title may have a `>` in it.
        let named = |name: &str| self.menu.iter().find(|item| item.id == name || item.title == name);
        by_number.or_else(|| named(whole)).or_else(|| named(part)).or_else(|| self.menu.first())
    }

    fn positional(&mut self, words: &[String]) {
        for (index, word) in (1..10).zip(words.iter().map(String::as_str).chain(std::iter::repeat(""))) {
            self.variables.insert(index.to_string(), word.to_owned());
        }
        self.variables.insert("#".to_owned(), words.len().to_string());
    }

    fn word(&self, word: &Word, words: &mut Vec<String>) -> Result<(), GrubError> {
        let mut current: Option<String> = None;
        for piece in word {
            match piece {
                Piece::Text { text, .. } => current.get_or_insert_default().push_str(text),
                Piece::Variable { name, quoted: true } => {
                    current.get_or_insert_default().push_str(self.variable(name));
                }
                Piece::Variable { name, quoted: false } => {
                    let value = self.variable(name);
                    for (index, part) in value.split(' ').enumerate() {
                        if index > 0 {
                            words.extend(current.take().filter(|word| !word.is_empty()));
                        }
                        if !part.is_empty() {
                            current.get_or_insert_default().push_str(part);
                        }
                    }
                }
            }
            if current.as_ref().is_some_and(|word| word.len() > VALUE_BYTES_MAX) || words.len() > 4096 {
                return Err(GrubError::Bound("makes words too long"));
            }
        }
        words.extend(current);
        Ok(())
    }

    fn words(&self, words: &[Word]) -> Result<Vec<String>, GrubError> {
        let mut expanded = Vec::new();
        for word in words {
            self.word(word, &mut expanded)?;
        }
        Ok(expanded)
    }

    /// Runs statements; whether the last one succeeded.
    fn block(&mut self, block: &Block) -> Result<bool, GrubError> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(GrubError::Bound("nests too deep"));
        }
        let mut success = true;
        for statement in block.iter() {
            if self.returning {
                break;
            }
            self.steps += 1;
            if self.steps > STEPS_MAX {
                return Err(GrubError::Bound("makes no end"));
            }
            success = self.statement(statement)?;
        }
        self.depth -= 1;
        Ok(success)
    }

    fn statement(&mut self, statement: &Statement) -> Result<bool, GrubError> {
        match statement {
            Statement::Command(words) => {
                let words = self.words(words)?;
                match words.split_first() {
                    Some((name, arguments)) => self.command(name, arguments),
                    None => Ok(true),
                }
            }
            Statement::If { arms, otherwise } => {
                for (condition, body) in arms {
                    if self.block(condition)? {
                        return self.block(body);
                    }
                }
                self.block(otherwise)
            }
            Statement::For { name, words, body } => {
                let mut success = true;
                for word in self.words(words)? {
                    self.set(name, word)?;
                    success = self.block(body)?;
                }
                Ok(success)
            }
            Statement::Function { name, body } => {
                self.functions.insert(name.clone(), Rc::clone(body));
                Ok(true)
            }
            Statement::Menu { words, body, submenu } => {
                let words = self.words(words)?;
                self.entry(words, body, *submenu)
            }
        }
    }

    fn entry(&mut self, words: Vec<String>, body: &Block, submenu: bool) -> Result<bool, GrubError> {
        if self.menu.len() >= ENTRIES_MAX {
            return Err(GrubError::Bound("has too many menu entries"));
        }
        let (mut id, mut plain) = (String::new(), Vec::new());
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            match word.as_str() {
                "--id" => id = words.next().unwrap_or_default(),
                "--class" | "--users" | "--hotkey" | "--source" => drop(words.next()),
                "--unrestricted" => {}
                other if other.starts_with("--id=") => id = other.trim_start_matches("--id=").to_owned(),
                other if other.starts_with("--") => {}
                _ => plain.push(word),
            }
        }
        let title = plain.first().cloned().unwrap_or_default();
        self.menu.push(Item { title, id, words: plain, body: Rc::clone(body), submenu });
        Ok(true)
    }

    fn set(&mut self, name: &str, value: String) -> Result<(), GrubError> {
        if value.len() > VALUE_BYTES_MAX || self.variables.len() > 4096 {
            return Err(GrubError::Bound("makes values too long"));
        }
        self.variables.insert(name.to_owned(), value);
        Ok(())
    }

    /// Where a path as a script writes it is.
    fn place(&self, text: &str) -> Place {
        let (device, path) = match text.strip_prefix('(').and_then(|rest| rest.split_once(')')) {
            Some((device, path)) => (device, path),
            None => (self.variable("root"), text),
        };
        let device = device.trim_matches(['(', ')']);
        Place { device: device.to_owned(), path: format!("/{}", path.trim_start_matches('/')) }
    }

    fn command(&mut self, name: &str, words: &[String]) -> Result<bool, GrubError> {
        if let Some(body) = self.functions.get(name).cloned() {
            let before = ["#", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
                .map(|name| (name.to_owned(), self.variable(name).to_owned()));
            self.positional(words);
            let success = self.block(&body);
            self.returning = false;
            self.variables.extend(before);
            return success;
        }
        match name {
            "set" => {
                if let Some((name, value)) = words.first().and_then(|word| word.split_once('=')) {
                    self.set(name, value.to_owned())?;
                }
            }
            "unset" => words.iter().for_each(|name| drop(self.variables.remove(name))),
            "[" => return Ok(self.test(words.strip_suffix(&["]".to_owned()]).unwrap_or(words))),
            "test" => return Ok(self.test(words)),
            "false" | "keystatus" | "sleep" | "loadfont" | "authenticate" => return Ok(false),
            "return" => self.returning = true,
            "load_env" => return self.load_env(words),
            "search" | "search.fs_uuid" | "search.fs_label" | "search.file" => {
                return self.search(name, words);
            }
            "source" | "." | "configfile" | "extract_entries_configfile" => return self.source(name, words),
            "blscfg" => self.blscfg = true,
            "linux" | "linux16" | "linuxefi" | "kernel" => {
                if let Some((path, arguments)) = words.split_first() {
                    self.kernel = Some((self.place(path), join(arguments)));
                    self.initrds.clear();
                }
            }
            "initrd" | "initrd16" | "initrdefi" => {
                self.initrds = words.iter().map(|path| self.place(path)).collect();
            }
            // What prepares the screen, loads modules or talks to people changes nothing here.
            _ => {}
        }
        Ok(true)
    }

    fn test(&self, words: &[String]) -> bool {
        conditions::evaluate(words, &|path| {
            let place = self.place(path);
            self.host.size(&place.device, &place.path)
        })
    }

    fn load_env(&mut self, words: &[String]) -> Result<bool, GrubError> {
        let mut file = format!("{}/grubenv", self.variable("prefix"));
        let mut names = Vec::new();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            match word.as_str() {
                "-f" | "--file" => file = words.next().cloned().unwrap_or_default(),
                other if other.starts_with("--file=") => {
                    other.trim_start_matches("--file=").clone_into(&mut file);
                }
                other if other.starts_with('-') => {}
                other => names.push(other),
            }
        }
        let place = self.place(&file);
        let Some(bytes) = self.host.read(&place.device, &place.path) else { return Ok(false) };
        for (name, value) in environment(&bytes) {
            // It is for one boot, and cannot be taken back from here.
            if name != "next_entry" && (names.is_empty() || names.contains(&name.as_str())) {
                self.set(&name, value)?;
            }
        }
        Ok(true)
    }

    fn search(&mut self, name: &str, words: &[String]) -> Result<bool, GrubError> {
        let mut by = match name {
            "search.fs_label" => Search::Label,
            "search.file" => Search::File,
            _ => Search::Uuid,
        };
        let (mut target, mut what) = ("root".to_owned(), Vec::new());
        let mut words = words.iter().peekable();
        while let Some(word) = words.next() {
            match word.as_str() {
                "-u" | "--fs-uuid" => by = Search::Uuid,
                "-l" | "--label" | "--fs-label" => by = Search::Label,
                "-f" | "--file" => by = Search::File,
                // The name may be left out, and then it is `root`.
                "-s" | "--set" if words.len() > 1 => target = words.next().cloned().unwrap_or_default(),
                "-h" | "--hint" => drop(words.next()),
                other if other.starts_with("--set=") => {
                    other.trim_start_matches("--set=").clone_into(&mut target)
                }
                other if other.starts_with('-') => {}
                _ => what.push(word.as_str()),
            }
        }
        // `search.fs_uuid UUID root`.
        if let (true, Some(variable)) = (name.contains('.'), what.get(1)) {
            (*variable).clone_into(&mut target);
        }
        match what.first().and_then(|what| self.host.search(by, what)) {
            Some(device) => self.set(&target, device).map(|()| true),
            None => Ok(false),
        }
    }

    fn source(&mut self, name: &str, words: &[String]) -> Result<bool, GrubError> {
        let Some(place) = words.first().map(|path| self.place(path)) else { return Ok(false) };
        let Some(bytes) = self.host.read(&place.device, &place.path) else { return Ok(false) };
        let block = parse(&String::from_utf8_lossy(&bytes))?;
        if name == "configfile" {
            self.menu.clear();
        }
        let success = self.block(&block);
        self.returning = false;
        success
    }
}

/// The arguments as the kernel gets them: what has a space is quoted again.
fn join(words: &[String]) -> String {
    let quoted = words.iter().map(|word| match word.contains([' ', '\t']) {
        true => format!("\"{word}\""),
        false => word.clone(),
    });
    quoted.collect::<Vec<_>>().join(" ")
}
