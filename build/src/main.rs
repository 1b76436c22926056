//! `cargo xtask`: builds the image, runs the lab and the tests.
fn main() {}
