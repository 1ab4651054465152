//! The public functions of a crate, read from the pages that rustdoc made of it.
//!
//! The pages show what macros expand to and where re-exports lead, which the sources do not; they are the one view of a
//! crate's interface that stable Rust gives.

use crate::ctx::Result;
use std::fs;
use std::path::Path;

/// One public function.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Item {
    /// `crate::module::Type::function`.
    pub path: String,
    /// Taking its address is not enough: it, or its `impl`, has a type or const parameter, it is a trait's, or it
    /// returns something that works only when used (`impl Iterator`).
    pub generic: bool,
}

/// All public functions of `name`, whose pages are in `doc/name`, sorted.
pub fn of_crate(doc: &Path, name: &str) -> Result<Vec<Item>> {
    let mut items = Vec::new();
    walk(&doc.join(name), name, &mut items)?;
    items.sort();
    items.dedup();
    if items.is_empty() {
        Err(format!("no public function found in the documentation of {name}").into())
    } else {
        Ok(items)
    }
}

fn walk(directory: &Path, module: &str, items: &mut Vec<Item>) -> Result<()> {
    for entry in fs::read_dir(directory).map_err(|e| format!("cannot read {}: {e}", directory.display()))? {
        let entry = entry?;
        let file = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type()?.is_dir() {
            walk(&entry.path(), &format!("{module}::{file}"), items)?;
        } else if let [kind, name, "html"] = file.split('.').collect::<Vec<_>>()[..] {
            page(kind, &format!("{module}::{name}"), &fs::read_to_string(entry.path())?, items);
        }
    }
    Ok(())
}

/// Adds the functions of one page.
fn page(kind: &str, path: &str, html: &str, items: &mut Vec<Item>) {
    // Where a public module re-exports a private one's item, the private path has a page that leads on.
    if html.contains("http-equiv=\"refresh\"") {
        return;
    }
    match kind {
        "fn" => {
            let generic = section(html, "item-decl", "</pre>").is_some_and(|s| is_generic(&text(s)));
            items.push(Item { path: path.into(), generic });
        }
        "struct" | "enum" | "union" => {
            if let Some(own) = section(html, "id=\"implementations-list\"", "id=\"trait-implementations\"") {
                inherent(path, own, items);
            }
            if let Some(list) = section(html, "id=\"trait-implementations-list\"", "id=\"synthetic-implementations\"") {
                implemented(path, list, items);
            }
        }
        "trait" => {
            if let Some(provided) = section(html, "id=\"provided-methods\"", "id=\"implementors\"") {
                let provided = provided.split("id=\"foreign-impls\"").next().unwrap_or(provided);
                for name in provided.split("id=\"method.").skip(1).filter_map(|s| s.split('"').next()) {
                    items.push(Item { path: format!("{path}::{name}"), generic: true });
                }
            }
        }
        _ => {}
    }
}

fn inherent(path: &str, html: &str, items: &mut Vec<Item>) {
    for block in html.split("<section id=\"impl-").skip(1) {
        let header = text(section(block, "class=\"code-header\"", "</h3>").unwrap_or(block));
        let of_generic = generic_parameters(header.trim_start_matches('>').trim_start().trim_start_matches("impl"));
        for method in block.split("<section id=\"method.").skip(1) {
            let declaration = text(section(method, "<h4 class=\"code-header\"", "</h4>").unwrap_or(method));
            // The identifier has a number behind it when several methods of the page share a name.
            let Some(name) = declaration.split("fn ").nth(1).and_then(|s| s.split(['(', '<']).next()) else { continue };
            items.push(Item { path: format!("{path}::{name}"), generic: of_generic || is_generic(&declaration) });
        }
    }
}

/// Traits of which a type's implementation does not count: derived ones, those with nothing but constants or bounds,
/// formatting for people, and the bitfield crate's access by run-time bit numbers, which the accessors made with it use
/// with constant ones.
const NOT_CALLED: &[&str] = &[
    "BitRange",
    "BitRangeMut",
    "Clone",
    "Copy",
    "Debug",
    "Declaration",
    "Default",
    "Display",
    "Eq",
    "FromBytes",
    "FromZeros",
    "Hash",
    "Immutable",
    "IntoBytes",
    "KnownLayout",
    "Ord",
    "PartialEq",
    "PartialOrd",
    "StructuralPartialEq",
    "TryFromBytes",
    "Unaligned",
];

/// An implementation of a trait counts as one item, `Type as Trait`.
fn implemented(path: &str, html: &str, items: &mut Vec<Item>) {
    for id in html.split("<section id=\"impl-").skip(1) {
        let Some((name, _)) = id.split_once("-for-") else { continue };
        let name = name.split("%3C").next().unwrap_or(name);
        if !NOT_CALLED.contains(&name) {
            items.push(Item { path: format!("{path} as {name}"), generic: true });
        }
    }
}

/// What is between `from` and the next `to` (or the end).
fn section<'a>(html: &'a str, from: &str, to: &str) -> Option<&'a str> {
    let rest = &html[html.find(from)? + from.len()..];
    Some(&rest[..rest.find(to).unwrap_or(rest.len())])
}

/// Without tags, entities resolved.
fn text(html: &str) -> String {
    let mut out = String::new();
    let mut inside = false;
    for c in html.chars() {
        match c {
            '<' => inside = true,
            '>' if inside => inside = false,
            _ if !inside => out.push(c),
            _ => {}
        }
    }
    out.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&").replace("&#39;", "'")
}

fn is_generic(declaration: &str) -> bool {
    let Some((_, rest)) = declaration.split_once("fn ") else { return false };
    let name_end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
    generic_parameters(&rest[name_end..]) || rest.contains("impl ")
}

/// True when `text` begins with a `<...>` that has more than lifetimes in it.
fn generic_parameters(text: &str) -> bool {
    let Some(rest) = text.strip_prefix('<') else { return false };
    let mut depth = 1;
    let mut parameter = String::new();
    let mut parameters = Vec::new();
    let mut previous = ' ';
    for c in rest.chars() {
        match c {
            '<' => depth += 1,
            '>' if previous != '-' => depth -= 1,
            _ => {}
        }
        if depth == 0 || depth == 1 && c == ',' {
            parameters.push(std::mem::take(&mut parameter));
        } else {
            parameter.push(c);
        }
        if depth == 0 {
            break;
        }
        previous = c;
    }
    parameters.iter().any(|p| !p.trim().is_empty() && !p.trim().starts_with('\''))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn items(kind: &str, html: &str) -> Vec<(String, bool)> {
        let mut found = Vec::new();
        page(kind, "c::X", html, &mut found);
        found.into_iter().map(|i| (i.path, i.generic)).collect()
    }

    #[test]
    fn lifetimes_alone_do_not_make_a_function_generic() {
        assert!(!is_generic("pub const fn f<'a>(x: &'a u8) -> Option<u8>"));
        assert!(is_generic("pub fn f<'a, T: Into<u8>>(x: T)"));
        assert!(is_generic("pub fn f<const N: usize>()"));
        assert!(is_generic("pub fn f(x: impl Fn(&u8) -> bool)"));
        assert!(is_generic("pub fn f(&self) -> impl Iterator<Item = u8> + '_"));
        assert!(!is_generic("pub fn f(x: Option<u8>)"));
    }

    #[test]
    fn methods_of_generic_and_plain_blocks_are_told_apart() {
        let html = "<div id=\"implementations-list\">\
            <section id=\"impl-X\"><h3 class=\"code-header\">impl&lt;'a&gt; X&lt;'a&gt;</h3></section>\
            <section id=\"method.a\"><h4 class=\"code-header\">pub fn <a>a</a>(self)</h4></section>\
            <section id=\"impl-X-1\"><h3 class=\"code-header\">impl&lt;T: A&lt;B&gt;&gt; X&lt;T&gt;</h3></section>\
            <section id=\"method.b-1\"><h4 class=\"code-header\">pub fn <a>b</a>(self)</h4></section>\
            <div id=\"trait-implementations\"><section id=\"method.fmt\"><h4 class=\"code-header\">fn fmt()</h4></section>";
        assert_eq!(items("struct", html), [("c::X::a".into(), false), ("c::X::b".into(), true)]);
    }

    #[test]
    fn implementations_of_traits_count_once_each() {
        let html = "id=\"trait-implementations-list\"><section id=\"impl-Clone-for-X\"><section id=\"impl-Memory%3CT%3E-for-X\">\
            <section id=\"method.read\"></section> id=\"synthetic-implementations\" <section id=\"impl-Send-for-X\">";
        assert_eq!(items("struct", html), [("c::X as Memory".into(), true)]);
    }

    #[test]
    fn only_provided_methods_of_traits_have_a_body() {
        let html = "id=\"required-methods\" id=\"tymethod.r\" id=\"provided-methods\" id=\"method.p\" \
                    id=\"foreign-impls\" id=\"method.p-1\" id=\"implementors\" id=\"method.q\"";
        assert_eq!(items("trait", html), [("c::X::p".into(), true)]);
    }

    #[test]
    fn a_page_that_leads_on_counts_for_nothing() {
        assert_eq!(items("fn", "<meta http-equiv=\"refresh\" content=\"0\">"), []);
        assert_eq!(items("fn", "<pre class=\"rust item-decl\">pub fn X()</pre>"), [("c::X".into(), false)]);
    }
}
