//! The overload manager's side of the process: the heap's figures from the allocator, and the refresh at each interval.

use std::rc::Rc;
use std::time::Duration;

use sampan_core::overload::{Heap, Overload};
use tikv_jemalloc_ctl::{Access, AsName, arenas, epoch, stats};
use tokio::sync::Notify;

/// jemalloc, as [`tikv_jemallocator`] puts it under the program.
pub struct Jemalloc;

/// The allocator's figures, as fresh as jemalloc can make them; 0 where it does not tell.
#[derive(Default, Clone, Copy)]
pub struct Figures {
    /// Bytes that the program holds.
    pub allocated: u64,
    /// Bytes that the allocator has from the kernel in use.
    pub active: u64,
    /// Bytes that the allocator keeps resident.
    pub resident: u64,
}

/// Asks the allocator.
pub fn figures() -> Figures {
    // The figures are those of the last epoch; one that cannot advance leaves them old.
    let _ = epoch::advance();
    let number = |result: tikv_jemalloc_ctl::Result<usize>| result.unwrap_or_default() as u64;
    Figures {
        allocated: number(stats::allocated::read()),
        active: number(stats::active::read()),
        resident: number(stats::resident::read()),
    }
}

impl Heap for Jemalloc {
    fn allocated(&self) -> u64 {
        figures().allocated
    }

    /// An arena whose decay time becomes 0 gives its unused pages back at once; then it is as it was.
    fn shrink(&self) {
        for arena in 0..arenas::narenas::read().unwrap_or_default() {
            for kind in ["dirty", "muzzy"] {
                let key = format!("arena.{arena}.{kind}_decay_ms\0");
                let name = key.as_bytes().name();
                let before: tikv_jemalloc_ctl::Result<isize> = name.read();
                // An arena that was never used has no such setting.
                if let Ok(before) = before
                    && name.write(0isize).is_ok()
                {
                    let _ = name.write(before);
                }
            }
        }
    }
}

/// What the allocator may keep for itself when a configuration was taken in.
const KEPT: u64 = 1 << 20;

/// How long after an update its memory is given back: what comes in quick succession is one.
const SETTLING: Duration = Duration::from_secs(3);

/// Gives back what updates left behind. jemalloc does so by itself only while a thread goes on allocating, and after a
/// great update the control thread does not.
pub async fn give_back(updated: Rc<Notify>) {
    loop {
        updated.notified().await;
        tokio::time::sleep(SETTLING).await;
        let Figures { active, resident, .. } = figures();
        if resident.saturating_sub(active) > KEPT {
            Jemalloc.shrink();
        }
    }
}

/// Refreshes for as long as the process lives. Nothing to do where nothing is measured.
pub fn start(mut overload: Overload) {
    if !overload.measures() {
        return;
    }
    tokio::task::spawn_local(async move {
        let mut ticks = tokio::time::interval(overload.refresh_interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // The first tick is at once, the first measurement is one interval later, as in Envoy.
        ticks.tick().await;
        loop {
            ticks.tick().await;
            overload.refresh();
        }
    });
}
