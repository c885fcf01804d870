fn main() {
    // cargo-pgrx adds this flag through RUSTFLAGS, which would rebuild every crate; here it concerns this library only.
    println!("cargo::rustc-cdylib-link-arg=-Wl,--no-gc-sections");
    println!("cargo::rerun-if-changed=build.rs");
}
