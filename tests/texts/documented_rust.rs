//! The Rust in the documentation is the Rust of a file that the compiler reads.

use crate::{files, root};

#[test]
fn the_rust_in_the_documentation_is_compiled() {
    let compiled = std::fs::read_to_string(root().join(COMPILED)).unwrap();
    let compiled = unindented(&compiled);
    let mut blocks = 0;
    for file in ["README.md", "CONTRIBUTING.md", "docs", "hsm-sim/README.md", "policies"] {
        for path in files(file, &["md"]) {
            let text = std::fs::read_to_string(&path).unwrap();
            for block in text.split("```rust\n").skip(1) {
                let block = block.split("```").next().unwrap();
                blocks += 1;
                assert!(
                    compiled.contains(&unindented(block)),
                    "{}: this block is not in {COMPILED}, which the compiler reads. Change both:\n\n{block}",
                    path.display()
                );
            }
        }
    }
    assert_eq!(blocks, 2, "blocks of Rust in the documentation");
}

/// Without the indentation and without empty lines: the block stands in a function there.
fn unindented(text: &str) -> String {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).map(|line| format!("{line}\n")).collect()
}

const COMPILED: &str = "kms-client/tests/client/documented.rs";
