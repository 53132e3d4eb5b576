//! Log-linear histograms: 90 bins for each power of ten, as in circllhist, so that quantiles and bucket counts
//! come out as Envoy's do.
//!
//! A value `v >= 1` falls into the bin of its first two digits: `[1.0, 1.1)`, … `[9.9, 10)`, `[10, 11)`, …
//! Values are whole numbers; 0 has a bin of its own without width.
//!
//! Each thread counts in its own [`Bins`], in place as long as two bins suffice; [`Merged`] is brought up to date at
//! every flush interval and is what the admin interface shows (so a value is seen at the next flush, not before; as in
//! Envoy).

use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What a histogram's values are measured in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Unit {
    /// No unit.
    Unspecified,
    /// Bytes.
    Bytes,
    /// Microseconds.
    Microseconds,
    /// Milliseconds.
    Milliseconds,
    /// Per cent: 1.0 is recorded as 1,000,000.
    Percent,
}

/// Bins per power of ten.
const PER_DECADE: usize = 90;
/// Powers of ten of a `u64`.
const DECADES: usize = 20;
/// What a [`Unit::Percent`] value is scaled by.
const PERCENT_SCALE: f64 = 1_000_000.0;

/// The quantiles that are shown.
pub const QUANTILES: [f64; 10] = [0.0, 0.25, 0.5, 0.75, 0.90, 0.95, 0.99, 0.995, 0.999, 1.0];

/// Upper bounds of the buckets where the configuration gives none.
pub const DEFAULT_BUCKETS: [f64; 19] = [
    0.5,
    1.0,
    5.0,
    10.0,
    25.0,
    50.0,
    100.0,
    250.0,
    500.0,
    1000.0,
    2500.0,
    5000.0,
    10000.0,
    30000.0,
    60000.0,
    300_000.0,
    600_000.0,
    1_800_000.0,
    3_600_000.0,
];

/// Bin to number of values; bin 0 is the value 0, bin `1 + 90 d + k` starts at `(10 + k) / 10 * 10^d`.
pub(super) type Counts = BTreeMap<u16, u64>;

/// The bin of a value.
#[inline]
pub(super) fn bin_of(value: u64) -> u16 {
    if value == 0 {
        return 0;
    }
    let decade = value.ilog10();
    let digits = if decade == 0 { value * 10 } else { value / 10_u64.pow(decade - 1) };
    (1 + decade as usize * PER_DECADE + (digits as usize - 10)) as u16
}

/// Lower bound and width of a bin.
fn bounds(bin: u16) -> (f64, f64) {
    let Some(bin) = usize::from(bin).checked_sub(1) else { return (0.0, 0.0) };
    let power = 10_f64.powi((bin / PER_DECADE) as i32);
    ((bin % PER_DECADE + 10) as f64 / 10.0 * power, power / 10.0)
}

/// Where a bin's number stands beside its count in a cell of [`Bins::few`].
const NUMBER: u32 = 48;

/// One thread's counts of one histogram.
///
/// Most histograms of a large mesh have one value (each subscription records how long its update took), so the first two
/// bins lie in place; the decades come with the third.
#[derive(Default)]
pub(super) struct Bins {
    /// `bin << 48 | count`; 0 is empty. Nobody counts to 2^48.
    few: [AtomicU64; 2],
    all: OnceLock<Box<Decades>>,
}

/// Room for every bin; a decade is allocated when its first value comes.
#[derive(Default)]
struct Decades {
    zero: AtomicU64,
    decades: [OnceLock<Box<[AtomicU64; PER_DECADE]>>; DECADES],
}

impl Bins {
    #[inline]
    pub(super) fn add(&self, bin: u16, n: u64) {
        match self.all.get() {
            Some(all) => all.add(bin, n),
            None => self.add_first(bin, n),
        }
    }

    fn add_first(&self, bin: u16, n: u64) {
        for cell in &self.few {
            let old = cell.load(Relaxed);
            if old == 0 || old >> NUMBER == u64::from(bin) {
                return cell.store((u64::from(bin) << NUMBER | old).wrapping_add(n), Relaxed);
            }
        }
        self.all.get_or_init(Box::default).add(bin, n);
    }

    /// A bin may come twice: in place, and among all.
    pub(super) fn for_each(&self, mut f: impl FnMut(u16, u64)) {
        for cell in self.few.iter().map(|cell| cell.load(Relaxed)).filter(|cell| *cell != 0) {
            f((cell >> NUMBER) as u16, cell & ((1 << NUMBER) - 1));
        }
        for (bin, cell) in self.all.get().into_iter().flat_map(|all| all.cells()) {
            match cell.load(Relaxed) {
                0 => {}
                n => f(bin, n),
            }
        }
    }

    pub(super) fn clear(&self) {
        self.few.iter().for_each(|cell| cell.store(0, Relaxed));
        let all = self.all.get().into_iter().flat_map(|all| all.cells());
        all.for_each(|(_, cell)| cell.store(0, Relaxed));
    }
}

impl Decades {
    fn add(&self, bin: u16, n: u64) {
        let cell = match usize::from(bin).checked_sub(1) {
            None => &self.zero,
            Some(bin) => {
                let decade = &self.decades[bin / PER_DECADE % DECADES];
                let cells = decade.get_or_init(|| Box::new(std::array::from_fn(|_| AtomicU64::new(0))));
                &cells[bin % PER_DECADE]
            }
        };
        cell.store(cell.load(Relaxed).wrapping_add(n), Relaxed);
    }

    fn cells(&self) -> impl Iterator<Item = (u16, &AtomicU64)> {
        let above = self.decades.iter().enumerate().flat_map(|(d, cells)| {
            let cells = cells.get().into_iter().flat_map(|c| c.iter().enumerate());
            cells.map(move |(k, cell)| ((1 + d * PER_DECADE + k) as u16, cell))
        });
        std::iter::once((0, &self.zero)).chain(above)
    }
}

/// A histogram as the last flush left it: its bins in ascending order.
#[derive(Default, Clone, Debug)]
pub struct Merged {
    cumulative: Box<[(u16, u64)]>,
    interval: Box<[(u16, u64)]>,
}

impl Merged {
    /// Takes over the sums of all threads; what is new since the last time becomes the interval.
    pub(super) fn update(&mut self, now: &Counts) {
        let before = |bin| {
            let at = self.cumulative.binary_search_by_key(bin, |(bin, _)| *bin);
            at.map_or(0, |at| self.cumulative[at].1)
        };
        self.interval =
            now.iter().map(|(bin, n)| (*bin, n - before(bin).min(*n))).filter(|(_, n)| *n > 0).collect();
        self.cumulative = now.iter().map(|(bin, n)| (*bin, *n)).collect();
    }

    /// Everything since the start.
    pub fn cumulative(&self, unit: Unit) -> Statistics<'_> {
        Statistics { counts: &self.cumulative, unit }
    }

    /// What came in the last flush interval.
    pub fn interval(&self, unit: Unit) -> Statistics<'_> {
        Statistics { counts: &self.interval, unit }
    }
}

/// What can be said of a set of counts.
#[derive(Clone, Copy)]
pub struct Statistics<'a> {
    counts: &'a [(u16, u64)],
    unit: Unit,
}

impl Statistics<'_> {
    fn scale(&self) -> f64 {
        if self.unit == Unit::Percent { PERCENT_SCALE } else { 1.0 }
    }

    /// The number of values.
    pub fn count(&self) -> u64 {
        self.counts.iter().map(|(_, n)| n).sum()
    }

    /// The approximate sum: a bin's values count with the harmonic mean of its bounds.
    pub fn sum(&self) -> f64 {
        let sum: f64 = self
            .counts
            .iter()
            .map(|(bin, n)| {
                let (low, width) = bounds(*bin);
                let high = low + width;
                if high == 0.0 { 0.0 } else { *n as f64 * (2.0 * (low * high) / (low + high)) }
            })
            .sum();
        // The sum of nothing is -0.0.
        (sum + 0.0) / self.scale()
    }

    /// The values at [`QUANTILES`]; NaN where there is no value. Within a bin the values are taken to be spread
    /// evenly, none of them on a bound.
    pub fn quantiles(&self) -> [f64; QUANTILES.len()] {
        let mut out = [f64::NAN; QUANTILES.len()];
        let total = self.count();
        if total == 0 {
            return out;
        }
        let mut bins = self.counts.iter();
        let (mut below, mut count, mut low, mut width) = (0, 0, 0.0, 0.0);
        for (quantile, out) in QUANTILES.iter().zip(&mut out) {
            let rank = ((total as f64 * quantile).ceil() as u64).clamp(1, total);
            while below + count < rank {
                let Some((bin, n)) = bins.next() else { break };
                below += count;
                count = *n;
                (low, width) = bounds(*bin);
            }
            let value = low + width * ((rank - below) as f64 / (count + 1) as f64);
            *out = value / self.scale();
        }
        out
    }

    /// The number of values at or below each upper bound; a bin that holds the bound counts as below.
    pub fn at_or_below(&self, upper_bounds: &[f64]) -> Vec<u64> {
        upper_bounds
            .iter()
            .map(|bound| {
                let bound = bound * self.scale();
                self.counts.iter().take_while(|(bin, _)| bounds(*bin).0 <= bound).map(|(_, n)| n).sum()
            })
            .collect()
    }

    /// Every bin in use: lower bound, width, number of values.
    pub fn detail(&self) -> impl Iterator<Item = (f64, f64, u64)> {
        self.counts.iter().map(|(bin, n)| {
            let (low, width) = bounds(*bin);
            (low / self.scale(), width / self.scale(), *n)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merged(values: &[u64]) -> Merged {
        let bins = Bins::default();
        values.iter().for_each(|v| bins.add(bin_of(*v), 1));
        let mut counts = Counts::new();
        bins.for_each(|bin, n| *counts.entry(bin).or_default() += n);
        let mut merged = Merged::default();
        merged.update(&counts);
        merged
    }

    #[test]
    fn bins_keep_two_digits() {
        for (value, low, width) in
            [(1, 1.0, 0.1), (33, 33.0, 1.0), (99, 99.0, 1.0), (100, 100.0, 10.0), (12_999, 12_000.0, 1000.0)]
        {
            assert_eq!(bounds(bin_of(value)), (low, width), "{value}");
        }
        assert_eq!(bounds(bin_of(0)), (0.0, 0.0));
        assert!(bounds(bin_of(u64::MAX)).0 <= u64::MAX as f64);
    }

    /// Values that Envoy 1.40 showed for the same samples.
    #[test]
    fn quantiles_and_sum_are_envoys() {
        let m = merged(&[1, 8, 1]);
        let s = m.cumulative(Unit::Milliseconds);
        assert_eq!(s.quantiles()[..4], [1.0333333333333334, 1.0333333333333334, 1.0666666666666667, 8.05]);
        assert_eq!(s.sum(), 10.144_927_536_231_883);
        assert_eq!(s.at_or_below(&[0.5, 1.0, 5.0, 10.0]), [0, 2, 2, 3]);
        let m = merged(&[0, 0, 0]);
        assert_eq!(m.cumulative(Unit::Milliseconds).quantiles(), [0.0; 10]);
        assert_eq!(m.cumulative(Unit::Milliseconds).sum(), 0.0);
        assert!(merged(&[]).cumulative(Unit::Bytes).quantiles()[0].is_nan());
    }

    /// Two bins in place, then all of them; cleared, they begin anew.
    #[test]
    fn the_third_bin_takes_room_for_all() {
        let bins = Bins::default();
        let counts = || {
            let mut counts = Counts::new();
            bins.for_each(|bin, n| *counts.entry(bin).or_default() += n);
            counts
        };
        for _ in 0..3 {
            [0, 7].iter().for_each(|bin| bins.add(*bin, 1));
        }
        assert!(bins.all.get().is_none());
        assert_eq!(counts(), Counts::from([(0, 3), (7, 3)]));
        [1800, 7, 0].iter().for_each(|bin| bins.add(*bin, 2));
        assert_eq!(counts(), Counts::from([(0, 5), (7, 5), (1800, 2)]));
        bins.clear();
        assert_eq!(counts(), Counts::new());
    }

    #[test]
    fn the_interval_holds_what_is_new() {
        let mut m = merged(&[1, 8]);
        m.update(&Counts::from([(bin_of(1), 3), (bin_of(8), 1)]));
        assert_eq!(m.interval(Unit::Unspecified).count(), 2);
        assert_eq!(m.cumulative(Unit::Unspecified).count(), 4);
    }
}
