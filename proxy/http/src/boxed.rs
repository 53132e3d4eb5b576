//! Boxes for what is large.

/// A box whose value is made where it stays. `Box::new` gets it ready-made, and copies it there.
#[inline(always)]
pub fn boxed<T>(make: impl FnOnce() -> T) -> Box<T> {
    Box::write(Box::new_uninit(), make())
}
