//! Giving back the memory that only the start needed.
//!
//! Reading a configuration runs through megabytes of decoders that serving never comes back to, and the kernel maps 64
//! KiB around each page that is touched. The pages stay in the file cache, so dropping them from the process costs
//! nothing but a minor fault for those that are needed after all.

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::{fs, io};

use nix::sys::mman::{MmapAdvise, madvise};

/// Drops the pages of the program and its libraries from memory. Gives how many bytes were in it.
pub fn release_program() -> io::Result<u64> {
    let mut released = 0;
    for mapping in clean_mappings(&fs::read_to_string("/proc/self/smaps")?) {
        let (Some(start), Some(length)) =
            (NonZeroUsize::new(mapping.start), mapping.end.checked_sub(mapping.start))
        else {
            continue;
        };
        let start = NonNull::<c_void>::without_provenance(start);
        // SAFETY: the mapping is private, of a file, cannot be written to and no page of it was (`clean_mappings`): the
        // next access finds the same bytes in the file.
        #[allow(unsafe_code)]
        let dropped = unsafe { madvise(start, length, MmapAdvise::MADV_DONTNEED) };
        dropped?;
        released += mapping.resident;
    }
    Ok(released)
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Mapping {
    start: usize,
    end: usize,
    resident: u64,
}

/// The mappings in a text of `/proc/PID/smaps` whose pages are all as in their file: the program's code and constants,
/// but neither what the loader relocated nor what a debugger put a breakpoint into.
fn clean_mappings(smaps: &str) -> Vec<Mapping> {
    let mut clean = Vec::new();
    let mut candidate: Option<Mapping> = None;
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let first = words.next().unwrap_or_default();
        match (first, &mut candidate) {
            ("Rss:", Some(mapping)) => mapping.resident = kib(words.next()) * 1024,
            ("Private_Dirty:" | "Shared_Dirty:" | "Anonymous:", Some(_)) if kib(words.next()) > 0 => {
                candidate = None;
            }
            // The last line of each.
            ("VmFlags:", _) => clean.extend(candidate.take()),
            (range, _) if !range.ends_with(':') => candidate = of_file(range, &mut words),
            _ => {}
        }
    }
    clean
}

fn kib(word: Option<&str>) -> u64 {
    // What cannot be read counts as written.
    word.and_then(|word| word.parse().ok()).unwrap_or(u64::MAX / 1024)
}

/// Reads `start-end permissions offset device inode path`.
fn of_file<'a>(range: &str, words: &mut impl Iterator<Item = &'a str>) -> Option<Mapping> {
    let (start, end) = range.split_once('-')?;
    let permissions = words.next()?;
    let inode = words.nth(2)?;
    let wanted = matches!(permissions, "r-xp" | "r--p") && inode != "0";
    let address = |text| usize::from_str_radix(text, 16).ok();
    wanted.then_some(Mapping { start: address(start)?, end: address(end)?, resident: 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_untouched_pages_of_files_go() {
        let mapping = |head: &str, rss: u64, dirty: u64| {
            format!(
                "{head}\nSize: 400 kB\nRss: {rss} kB\nPrivate_Dirty: {dirty} kB\nAnonymous: {dirty} kB\nVmFlags: rd\n"
            )
        };
        let text = [
            mapping("1000-3000 r-xp 00000000 08:01 77 /bin/sampan", 8, 0),
            mapping("3000-4000 r--p 00002000 08:01 77 /bin/sampan", 4, 4),
            mapping("4000-5000 rw-p 00003000 08:01 77 /bin/sampan", 4, 0),
            mapping("5000-6000 r--p 00000000 00:00 0 ", 4, 0),
            mapping("6000-7000 r-xp 00000000 00:00 0 [vdso]", 4, 0),
            mapping("7000-8000 r--s 00000000 08:01 78 /dev/shm/x", 4, 0),
            mapping("8000-9000 r--p 00000000 08:01 79 /lib/libc.so", 4, 0),
        ];
        let found = clean_mappings(&text.concat());
        let wanted = [
            Mapping { start: 0x1000, end: 0x3000, resident: 8192 },
            Mapping { start: 0x8000, end: 0x9000, resident: 4096 },
        ];
        assert_eq!(found, wanted);
        assert_eq!(clean_mappings("x\nRss: 1\n"), []);
    }

    #[test]
    fn the_program_goes_on() {
        let resident = || clean_mappings(&fs::read_to_string("/proc/self/smaps").unwrap());
        let sum = |all: Vec<Mapping>| all.iter().map(|mapping| mapping.resident).sum::<u64>();
        let before = sum(resident());
        assert!(release_program().unwrap() >= before / 2);
        assert!(sum(resident()) < before);
    }
}
