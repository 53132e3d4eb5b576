//! What filters keep for as long as a connection lives, by its type.
//!
//! A connection is served by one task, so that nothing here is locked or counted atomically. A connection that no
//! filter keeps anything for pays for an empty list.

use std::any::{Any, TypeId};
use std::cell::RefCell;
use std::fmt;
use std::rc::Rc;

/// At most one value of each type.
#[derive(Clone, Default)]
pub struct Slots(RefCell<Vec<(TypeId, Rc<dyn Any>)>>);

impl Slots {
    /// The value of a type, made by the first who asks for it.
    pub fn get_or_insert_with<T: 'static>(&self, make: impl FnOnce() -> T) -> Rc<T> {
        if let Some(found) = self.get::<T>() {
            return found;
        }
        let made = Rc::new(make());
        self.0.borrow_mut().push((TypeId::of::<T>(), made.clone()));
        made
    }

    /// Whether nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.0.borrow().is_empty()
    }

    /// The value of a type, if there is one.
    pub fn get<T: 'static>(&self) -> Option<Rc<T>> {
        let slots = self.0.borrow();
        let (_, value) = slots.iter().find(|(id, _)| *id == TypeId::of::<T>())?;
        value.clone().downcast().ok()
    }
}

impl fmt::Debug for Slots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slots({})", self.0.borrow().len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_value_of_each_type() {
        let slots = Slots::default();
        assert!(slots.get::<u8>().is_none());
        assert_eq!(*slots.get_or_insert_with(|| 1u8), 1);
        assert_eq!(*slots.get_or_insert_with(|| 2u8), 1);
        assert_eq!(*slots.get_or_insert_with(|| 3u16), 3);
        assert_eq!(slots.clone().get::<u8>().as_deref(), Some(&1));
    }
}
