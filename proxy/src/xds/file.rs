//! Watching files: one inotify instance for all, on the control thread.
//!
//! As in Envoy only a move to the file's name counts (`rename`, which is atomic); a file written in place may be read
//! half-done, so that is no signal.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::Path;
use std::rc::{Rc, Weak};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::io::unix::AsyncFd;

/// What is called when something was moved in.
type Moved = Rc<dyn Fn()>;

/// All watches of the process. Clones share.
#[derive(Clone)]
pub struct Watcher(Rc<Inner>);

struct Inner {
    inotify: AsyncFd<Fd>,
    folders: RefCell<HashMap<WatchDescriptor, Vec<Entry>>>,
    next: std::cell::Cell<u64>,
}

struct Entry {
    id: u64,
    /// None: any name.
    name: Option<OsString>,
    moved: Moved,
}

/// A watch; it ends when this is dropped.
pub struct Watch {
    watcher: Weak<Inner>,
    folder: WatchDescriptor,
    id: u64,
}

struct Fd(Inotify);

impl AsRawFd for Fd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Watcher {
    /// Needs the control thread's runtime.
    #[allow(
        deprecated,
        reason = "`register` is unsafe for types that could close their descriptor; this one owns it"
    )]
    pub fn new() -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        let inner = Rc::new(Inner {
            inotify: AsyncFd::new(Fd(inotify))?,
            folders: RefCell::default(),
            next: std::cell::Cell::default(),
        });
        tokio::task::spawn_local(run(inner.clone()));
        Ok(Self(inner))
    }

    /// Calls when a file is moved to this path.
    pub fn watch_file(&self, path: &Path, moved: Moved) -> io::Result<Watch> {
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
        self.watch(folder, path.file_name().map(OsString::from), moved)
    }

    /// Calls when anything is moved into this folder.
    pub fn watch_folder(&self, folder: &Path, moved: Moved) -> io::Result<Watch> {
        self.watch(folder, None, moved)
    }

    fn watch(&self, folder: &Path, name: Option<OsString>, moved: Moved) -> io::Result<Watch> {
        let inner = &self.0;
        let folder = inner.inotify.get_ref().0.add_watch(folder, AddWatchFlags::IN_MOVED_TO)?;
        let id = inner.next.get();
        inner.next.set(id + 1);
        inner.folders.borrow_mut().entry(folder).or_default().push(Entry { id, name, moved });
        Ok(Watch { watcher: Rc::downgrade(inner), folder, id })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let Some(inner) = self.watcher.upgrade() else { return };
        let mut folders = inner.folders.borrow_mut();
        let Some(entries) = folders.get_mut(&self.folder) else { return };
        let ended = entries.iter().position(|e| e.id == self.id).map(|place| entries.remove(place));
        if entries.is_empty() {
            folders.remove(&self.folder);
            // The folder may be gone, and the watch with it.
            let _ = inner.inotify.get_ref().0.rm_watch(self.folder);
        }
        drop(folders);
        // What was to be called may hold watches itself: a secret's source holds those of its files.
        drop(ended);
    }
}

async fn run(inner: Rc<Inner>) {
    loop {
        let Ok(mut ready) = inner.inotify.readable().await else { return };
        let events = match inner.inotify.get_ref().0.read_events() {
            Ok(events) => events,
            Err(nix::errno::Errno::EAGAIN) => {
                ready.clear_ready();
                continue;
            }
            Err(error) => return super::log_error(&format!("inotify: {error}")),
        };
        drop(ready);
        // That a folder is gone is told, too.
        for event in events.iter().filter(|event| event.mask.contains(AddWatchFlags::IN_MOVED_TO)) {
            let moved: Vec<Moved> = {
                let folders = inner.folders.borrow();
                let entries = folders.get(&event.wd).map(Vec::as_slice).unwrap_or_default();
                let fits = |e: &&Entry| e.name.is_none() || e.name == event.name;
                entries.iter().filter(fits).map(|e| e.moved.clone()).collect()
            };
            moved.iter().for_each(|moved| moved());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::time::Duration;

    #[tokio::test]
    async fn moves_to_the_name_count_and_nothing_else() {
        let folder = std::env::temp_dir().join(format!("sampan-watch-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        tokio::task::LocalSet::new()
            .run_until(async {
                let watcher = Watcher::new().unwrap();
                let (file, any) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(0)));
                let count = |cell: &Rc<Cell<u32>>| -> Moved {
                    let cell = cell.clone();
                    Rc::new(move || cell.set(cell.get() + 1))
                };
                let one = watcher.watch_file(&folder.join("a"), count(&file)).unwrap();
                let _two = watcher.watch_folder(&folder, count(&any)).unwrap();
                let step = async |from: &str, to: &str| {
                    std::fs::write(folder.join(from), "x").unwrap();
                    std::fs::rename(folder.join(from), folder.join(to)).unwrap();
                    tokio::time::sleep(Duration::from_millis(30)).await;
                    (file.get(), any.get())
                };
                assert_eq!(step("t", "a").await, (1, 1));
                assert_eq!(step("t", "b").await, (1, 2));
                drop(one);
                assert_eq!(step("t", "a").await, (1, 3));
                let inner = Cell::new(Some(watcher.watch_file(&folder.join("b"), count(&file)).unwrap()));
                let holds: Moved = Rc::new(move || drop(inner.take()));
                drop(watcher.watch_file(&folder.join("a"), holds).unwrap());
                assert_eq!(step("t", "b").await, (1, 4));
            })
            .await;
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
