//! No file of a crate imports a file that imports it, directly or over others: a reader can start
//! at the files that import nothing and go up.
//!
//! The files are read as syntax, tests apart. An arrow runs from a file to the file that defines
//! what it names. A `pub use` only hands names on and is no arrow. Two kinds of arrows are not
//! counted: to the root file of a crate, which holds what all its files share; and from a file that
//! `#[path]` includes to the place that includes it, because such a file is written against the
//! names of more than one place.
//!
//! Not seen is what macros, attributes and derives name in their arguments, and a method that is
//! called on a value: the methods of one type may stand in several files.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use syn::{
    Attribute, Expr, ExprLit, Item, ItemMod, Lit, Meta, UseTree, Visibility,
    visit::{self, Visit},
};

use crate::crates::{metadata, sources};

#[test]
fn no_files_import_each_other() {
    let mut circles = Vec::new();
    let mut files = 0;
    for source in sources(&metadata()) {
        let arrows = Tree::read(&source, &|path| std::fs::read_to_string(path).ok()).arrows();
        files += arrows.len();
        circles.extend(self::circles(&arrows));
    }
    assert!(files > 100, "only {files} files import another one: the workspace is not read as it should be");
    assert!(
        circles.is_empty(),
        "files import each other; move what both need into a file below both:\n{}",
        circles.join("\n")
    );
}

/// The measure itself: what is a circle, and what is none.
#[test]
fn a_circle_is_found() {
    let found = |files: &[(&str, &str)]| {
        let files: BTreeMap<PathBuf, String> =
            files.iter().map(|(path, text)| (PathBuf::from(path), (*text).to_owned())).collect();
        circles(&Tree::read(Path::new("src/lib.rs"), &|path| files.get(path).cloned()).arrows()).len()
    };
    let root = ("src/lib.rs", "mod a; mod b; pub use a::A;");
    assert_eq!(found(&[root, ("src/a.rs", "pub struct A;"), ("src/b.rs", "use crate::A; struct B(A);")]), 0);
    assert_eq!(
        found(&[root, ("src/a.rs", "use crate::b::B; pub struct A(B);"), ("src/b.rs", "use crate::A; pub struct B;")]),
        1
    );
    assert_eq!(
        found(&[
            root,
            ("src/a.rs", "pub fn a() { super::b::f() }"),
            ("src/b.rs", "use super::a::a; pub fn f() { a() }")
        ]),
        1
    );
    // A parent that uses its child, whose child uses the parent's own item.
    let child = ("src/a/c.rs", "use super::A; pub fn f() {}");
    assert_eq!(found(&[root, ("src/a.rs", "mod c; use c::f; pub struct A;"), ("src/b.rs", ""), child]), 1);
    assert_eq!(found(&[root, ("src/a.rs", "mod c; pub use c::f; pub struct A;"), ("src/b.rs", ""), child]), 0);
    // A star, a name of its own, a module by `self`, a circle of three, and the root's own item.
    assert_eq!(
        found(&[
            root,
            ("src/a.rs", "use super::b::*; pub fn a() -> B {}"),
            ("src/b.rs", "use crate::A; pub struct B;")
        ]),
        0
    );
    assert_eq!(
        found(&[root, ("src/a.rs", "use super::b::*; pub struct A(B);"), ("src/b.rs", "use crate::A; pub struct B;")]),
        1
    );
    assert_eq!(
        found(&[
            root,
            ("src/a.rs", "use super::b::B as C; pub struct A(C);"),
            ("src/b.rs", "use crate::A; pub struct B;")
        ]),
        1
    );
    assert_eq!(
        found(&[
            root,
            ("src/a.rs", "use super::b::{self}; pub struct A(b::B);"),
            ("src/b.rs", "use crate::A; pub struct B;")
        ]),
        1
    );
    let three = ("src/lib.rs", "mod a; mod b; mod c; pub struct Root(a::A);");
    assert_eq!(
        found(&[
            three,
            ("src/a.rs", "use crate::b::B; pub struct A(B);"),
            ("src/b.rs", "use crate::c::C; pub struct B(C);"),
            ("src/c.rs", "use crate::{Root, a::A}; pub struct C(A, Root);")
        ]),
        1
    );
    assert_eq!(
        found(&[three, ("src/a.rs", "use crate::Root; pub struct A(Root);"), ("src/b.rs", ""), ("src/c.rs", "")]),
        0
    );
    // What only tests use is no arrow.
    let tests = ("src/b.rs", "#[cfg(test)] mod tests { use crate::A; } pub struct B;");
    assert_eq!(found(&[root, ("src/a.rs", "use crate::b::B; pub struct A(B);"), tests]), 0);
}

type Arrows = BTreeMap<PathBuf, BTreeSet<PathBuf>>;

/// The groups of files that reach each other, one line each.
fn circles(arrows: &Arrows) -> Vec<String> {
    let reached = |from: &PathBuf| {
        let mut reached = BTreeSet::new();
        let mut open: Vec<&PathBuf> = arrows.get(from).into_iter().flatten().collect();
        while let Some(file) = open.pop() {
            if reached.insert(file) {
                open.extend(arrows.get(file).into_iter().flatten());
            }
        }
        reached
    };
    let reached: BTreeMap<&PathBuf, BTreeSet<&PathBuf>> = arrows.keys().map(|file| (file, reached(file))).collect();
    let mut circles: BTreeSet<Vec<&PathBuf>> = BTreeSet::new();
    for (file, reaches) in reached.iter().filter(|(file, reaches)| reaches.contains(*file)) {
        circles.insert(
            reaches
                .iter()
                .filter(|other| reached.get(*other).is_some_and(|back| back.contains(file)))
                .copied()
                .collect(),
        );
    }
    let line = |circle: &Vec<&PathBuf>| {
        let inside = |file: &PathBuf| {
            let to = arrows[file].iter().filter(|to| circle.contains(to));
            format!("  {} -> {}", file.display(), to.map(|to| to.display().to_string()).collect::<Vec<_>>().join(", "))
        };
        format!(
            "a circle of {}:\n{}",
            circle.len(),
            circle.iter().map(|file| inside(file)).collect::<Vec<_>>().join("\n")
        )
    };
    circles.iter().map(line).collect()
}

/// A module: in a file of its own, or within its parent's.
struct Module {
    place: Place,
    children: BTreeMap<String, usize>,
    /// What it defines itself.
    items: BTreeSet<String>,
    /// The names that it imports, with what each stands for.
    imports: BTreeMap<String, Vec<String>>,
    /// What it imports by a star.
    stars: Vec<Vec<String>>,
    /// All paths that it names, those of a `pub use` apart.
    paths: BTreeSet<Vec<String>>,
}

/// Where a module stands.
struct Place {
    file: PathBuf,
    /// The folder of its child modules.
    folder: PathBuf,
    parent: Option<usize>,
    /// Whether a `#[path]` includes it, or a module above it.
    included: bool,
}

/// Reads a file, if there is one.
type Source<'a> = &'a dyn Fn(&Path) -> Option<String>;

/// The modules of a crate; the first is the root.
struct Tree {
    modules: Vec<Module>,
}

impl Tree {
    fn read(root: &Path, source: Source<'_>) -> Self {
        let mut tree = Self { modules: Vec::new() };
        let folder = root.parent().unwrap().to_owned();
        tree.file(Place { file: root.to_owned(), folder, parent: None, included: false }, source);
        tree
    }

    fn file(&mut self, place: Place, source: Source<'_>) -> usize {
        let text = source(&place.file).unwrap_or_else(|| panic!("{} cannot be read", place.file.display()));
        let syntax = syn::parse_file(&text).unwrap_or_else(|error| panic!("{}: {error}", place.file.display()));
        self.module(place, &syntax.items, source)
    }

    fn module(&mut self, place: Place, items: &[Item], source: Source<'_>) -> usize {
        let mut names = Names::default();
        items.iter().for_each(|item| names.visit_item(item));
        let Names { modules, items, imports, stars, paths } = names;
        let this = self.modules.len();
        self.modules.push(Module { place, children: BTreeMap::new(), items, imports, stars, paths });
        for module in modules {
            let name = module.ident.to_string();
            let place = self.below(this, module, source);
            let child = match &module.content {
                Some((_, items)) => self.module(place, items, source),
                None => self.file(place, source),
            };
            self.modules[this].children.insert(name, child);
        }
        this
    }

    /// Where a child module stands.
    fn below(&self, parent: usize, child: &ItemMod, source: Source<'_>) -> Place {
        let Place { file, folder, included, .. } = &self.modules[parent].place;
        let below = folder.join(child.ident.to_string());
        let flat = below.with_extension("rs");
        let (file, folder, included) = match child.attrs.iter().find_map(path_attribute) {
            Some(named) => {
                let file = file.parent().unwrap().join(named);
                let folder = file.parent().unwrap().to_owned();
                (file, folder, true)
            }
            None if child.content.is_some() => (file.clone(), below, *included),
            None if source(&flat).is_some() => (flat, below, *included),
            None => (below.join("mod.rs"), below, *included),
        };
        Place { file, folder, parent: Some(parent), included }
    }

    fn arrows(&self) -> Arrows {
        let mut arrows = Arrows::new();
        let root = &self.modules[0].place.file;
        for (number, Module { place, paths, .. }) in self.modules.iter().enumerate() {
            let defined = paths.iter().filter_map(|path| self.defines(number, path, &mut BTreeSet::new()));
            let defined = defined.map(|to| &self.modules[to].place);
            let others = defined.filter(|to| ![root, &place.file].contains(&&to.file));
            let others = others.filter(|to| to.included || !place.included);
            let others: Vec<PathBuf> = others.map(|to| to.file.clone()).collect();
            if !others.is_empty() {
                arrows.entry(place.file.clone()).or_default().extend(others);
            }
        }
        arrows
    }

    /// The module that defines what a path names from within a module; nothing for what another
    /// crate defines, and for a path that names a module.
    fn defines(&self, from: usize, path: &[String], asked: &mut BTreeSet<(usize, Vec<String>)>) -> Option<usize> {
        if !asked.insert((from, path.to_vec())) {
            return None;
        }
        let (first, rest) = path.split_first()?;
        let module = &self.modules[from];
        match first.as_str() {
            "crate" => return self.defines(0, rest, asked),
            "self" => return self.defines(from, rest, asked),
            "super" => return self.defines(module.place.parent?, rest, asked),
            _ => {}
        }
        if let Some(child) = module.children.get(first) {
            return self.defines(*child, rest, asked);
        }
        if module.items.contains(first) {
            return Some(from);
        }
        // What begins with neither is of another crate.
        let within = |path: &&Vec<String>| {
            path.first().is_some_and(|first| {
                ["crate", "self", "super"].contains(&first.as_str()) || module.children.contains_key(first)
            })
        };
        if let Some(meant) = module.imports.get(first) {
            let meant = Some(meant).filter(within)?;
            return self.defines(from, &[meant, rest].concat(), asked);
        }
        module.stars.iter().filter(within).find_map(|star| self.defines(from, &[star, path].concat(), asked))
    }
}

/// What a module's items define and name. Items that are compiled for tests only are passed over.
#[derive(Default)]
struct Names<'a> {
    modules: Vec<&'a ItemMod>,
    items: BTreeSet<String>,
    imports: BTreeMap<String, Vec<String>>,
    stars: Vec<Vec<String>>,
    paths: BTreeSet<Vec<String>>,
}

impl Names<'_> {
    fn import(&mut self, before: &[String], tree: &UseTree, public: bool) {
        match tree {
            UseTree::Path(path) => self.import(&[before, &[path.ident.to_string()]].concat(), &path.tree, public),
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.import(before, tree, public)),
            UseTree::Glob(_) => self.stars.push(before.to_vec()),
            UseTree::Name(name) => self.imported(before, &name.ident.to_string(), &name.ident.to_string(), public),
            UseTree::Rename(name) => self.imported(before, &name.ident.to_string(), &name.rename.to_string(), public),
        }
    }

    fn imported(&mut self, before: &[String], name: &str, alias: &str, public: bool) {
        let (path, alias) = match (name, before.last()) {
            ("self", Some(last)) => (before.to_vec(), if alias == "self" { last.clone() } else { alias.to_owned() }),
            _ => ([before, &[name.to_owned()]].concat(), alias.to_owned()),
        };
        if !public {
            self.paths.insert(path.clone());
        }
        // `use sqlx;` and the like: a name that stands for itself tells nothing.
        if path != [alias.as_str()] {
            self.imports.insert(alias, path);
        }
    }
}

impl<'a> Visit<'a> for Names<'a> {
    fn visit_item(&mut self, item: &'a Item) {
        let (attributes, name): (&[Attribute], Option<String>) = match item {
            Item::Const(item) => (&item.attrs, Some(item.ident.to_string())),
            Item::Enum(item) => (&item.attrs, Some(item.ident.to_string())),
            Item::Fn(item) => (&item.attrs, Some(item.sig.ident.to_string())),
            Item::Impl(item) => (&item.attrs, None),
            Item::Macro(item) => (&item.attrs, item.ident.as_ref().map(ToString::to_string)),
            Item::Mod(item) => (&item.attrs, None),
            Item::Static(item) => (&item.attrs, Some(item.ident.to_string())),
            Item::Struct(item) => (&item.attrs, Some(item.ident.to_string())),
            Item::Trait(item) => (&item.attrs, Some(item.ident.to_string())),
            Item::Type(item) => (&item.attrs, Some(item.ident.to_string())),
            Item::Use(item) => (&item.attrs, None),
            _ => (&[], None),
        };
        if attributes.iter().any(for_tests) {
            return;
        }
        self.items.extend(name);
        match item {
            Item::Mod(module) => self.modules.push(module),
            Item::Use(import) => {
                self.import(&[], &import.tree, !matches!(import.vis, Visibility::Inherited));
            }
            _ => visit::visit_item(self, item),
        }
    }

    fn visit_path(&mut self, path: &'a syn::Path) {
        self.paths.insert(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        visit::visit_path(self, path);
    }
}

/// The file that a `#[path = "…"]` names.
fn path_attribute(attribute: &Attribute) -> Option<String> {
    let Meta::NameValue(named) = &attribute.meta else { return None };
    match &named.value {
        Expr::Lit(ExprLit { lit: Lit::Str(path), .. }) if named.path.is_ident("path") => Some(path.value()),
        _ => None,
    }
}

/// Whether an attribute is `#[cfg(test)]` or the like.
fn for_tests(attribute: &Attribute) -> bool {
    attribute.path().is_ident("cfg")
        && attribute
            .meta
            .require_list()
            .is_ok_and(|list| list.tokens.to_string().split(|c: char| !c.is_alphanumeric()).any(|word| word == "test"))
}
