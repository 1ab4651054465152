//! docs/vmx-controls.md against the table that the capability MSRs are made of.

use nvmx::caps::table::{self, Control, Treatment};
use nvmx::controls::{entry, exit, pin, primary, secondary};

fn word(treatment: Treatment) -> &'static str {
    match treatment {
        Treatment::Emulated => "emulated",
        Treatment::Offered => "offered",
        Treatment::Refused => "refused",
    }
}

/// The rows that the document must have: control, treatment, and whether the enlightened VMCS carries it.
fn rows(heading: &str, table: &[Control], name: impl Fn(u32) -> Option<&'static str>) -> Vec<String> {
    let row = |control: &Control| {
        let name = name(control.bit).unwrap_or_else(|| panic!("{heading}: {:#x} has no name", control.bit));
        let carried = control.fields.iter().all(|field| field.evmcs().is_some());
        let carried = match control.treatment {
            Treatment::Refused => "",
            _ if carried => "yes",
            _ => "no",
        };
        format!("| `{heading}::{name}` | {} | {} | {carried} |", control.bit.trailing_zeros(), word(control.treatment))
    };
    table.iter().map(row).collect()
}

#[test]
fn every_control_has_its_row() {
    let document = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/vmx-controls.md")).unwrap();
    let all = [
        rows("pin", table::PIN, |bit| pin::names(bit).next()),
        rows("primary", table::PRIMARY, |bit| primary::names(bit).next()),
        rows("secondary", table::SECONDARY, |bit| secondary::names(bit).next()),
        rows("exit", table::EXIT, |bit| exit::names(bit).next()),
        rows("entry", table::ENTRY, |bit| entry::names(bit).next()),
    ]
    .concat();
    let missing: Vec<&String> =
        all.iter().filter(|row| !document.lines().any(|line| line.starts_with(row.as_str()))).collect();
    assert!(missing.is_empty(), "docs/vmx-controls.md lacks, or has otherwise:\n{missing:#?}");
    let in_document = document.lines().filter(|line| line.starts_with("| `") && line.contains("::")).count();
    assert_eq!(in_document, all.len(), "docs/vmx-controls.md has rows of no control");
}

#[test]
fn the_table_knows_every_bit_once() {
    for (table, known) in [
        (table::PIN, pin::KNOWN),
        (table::PRIMARY, primary::KNOWN),
        (table::SECONDARY, secondary::KNOWN),
        (table::EXIT, exit::KNOWN),
        (table::ENTRY, entry::KNOWN),
    ] {
        assert_eq!(table.iter().fold(0, |bits, control| bits | control.bit), known);
        assert_eq!(table.len() as u32, known.count_ones());
    }
}
