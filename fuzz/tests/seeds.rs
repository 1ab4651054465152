//! Replays the committed seeds through every target, on stable.

use std::fs;
use std::path::Path;

#[test]
fn seeds_replay() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds");
    for (name, target) in fuzz::TARGETS {
        let mut count = 0;
        for entry in fs::read_dir(seeds.join(name)).expect("every target has seeds") {
            let path = entry.expect("a directory entry").path();
            let bytes = fs::read(&path).expect("a readable seed");
            println!("{}", path.display());
            target(&bytes);
            count += 1;
        }
        assert!(count >= 8, "{name} has {count} seeds");
    }
}

/// Every target is a binary of the manifest and has a file, and there are no others.
#[test]
fn the_list_of_targets_is_complete() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let manifest = fs::read_to_string(root.join("Cargo.toml")).expect("a manifest");
    let files = fs::read_dir(root.join("fuzz_targets")).expect("targets").count();
    assert_eq!(files, fuzz::TARGETS.len());
    assert_eq!(manifest.matches("[[bin]]").count(), fuzz::TARGETS.len());
    for (name, _) in fuzz::TARGETS {
        assert!(manifest.contains(&format!("path = \"fuzz_targets/{name}.rs\"")), "{name}");
        assert!(root.join(format!("fuzz_targets/{name}.rs")).is_file(), "{name}");
    }
}
