//! Where salts, keys and object ids come from: the operating system, through one door.

use uuid::Uuid;

/// Fills `out` from the operating system's generator.
pub fn fill(out: &mut [u8]) {
    use rand::TryRng;
    rand::rngs::SysRng
        .try_fill_bytes(out)
        .expect("the operating system gives random bytes; without them nothing can be sealed");
}

/// `N` random bytes.
pub fn bytes<const N: usize>() -> [u8; N] {
    let mut b = [0; N];
    fill(&mut b);
    b
}

/// A random object id.
pub fn uuid() -> Uuid {
    uuid::Builder::from_random_bytes(bytes()).into_uuid()
}
