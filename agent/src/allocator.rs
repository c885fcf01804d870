//! How the C library gives memory back.
//!
//! Left alone, glibc raises the size from which it maps a block by itself to that of the largest such block that was ever
//! freed (mallopt(3), `M_MMAP_THRESHOLD`), and keeps twice as much at the end of each thread's arena: after a few reads of
//! some mebibytes on as many threads, what was freed is neither given back nor found by the next thread. `limits.memory`
//! is about what the process holds, so large blocks are mapped, always, and go when they are freed.

/// Blocks from this size on are mapped: beyond a chunk of a sealed object with its overhead, below a part or a range.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const MAPPED_BYTES: libc::c_int = 512 << 10;
/// Free bytes that an arena keeps at its end.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const KEPT_BYTES: libc::c_int = 512 << 10;
/// Threads come and go, and each arena keeps what its threads freed.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const ARENAS: libc::c_int = 4;

/// To be called before the first thread starts. Other C libraries need nothing of it.
pub fn bound() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: sets parameters of the allocator; refused ones stay as they were.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BYTES);
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT_BYTES);
        libc::mallopt(libc::M_ARENA_MAX, ARENAS);
    }
}
