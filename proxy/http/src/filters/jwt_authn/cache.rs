//! Tokens that were verified before (`jwt_cache_config`), by worker: the token used least lately makes room.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use std::sync::{Arc, Weak};

use foldhash::fast::RandomState;

use super::config::CacheSize;
use crate::jwt::Jwt;

/// Whose cache it is: a provider of a filter. What lies in the caches of a filter that is gone goes at the next first use.
pub(super) type Owner = Arc<()>;

thread_local! {
    static CACHES: RefCell<Caches> = RefCell::default();
}

/// By owner and provider.
type Caches = HashMap<(usize, usize), (Weak<()>, Cache)>;

#[derive(Default)]
struct Cache {
    tokens: HashMap<Rc<str>, (u64, Rc<Jwt>), RandomState>,
    /// By their last use.
    order: BTreeMap<u64, Rc<str>>,
    uses: u64,
}

/// Looks a token up.
pub(super) fn find(owner: &Owner, provider: usize, token: &str) -> Option<Rc<Jwt>> {
    CACHES.with_borrow_mut(|all| all.get_mut(&key(owner, provider))?.1.find(token))
}

/// Forgets a token.
pub(super) fn forget(owner: &Owner, provider: usize, token: &str) {
    CACHES.with_borrow_mut(|all| {
        if let Some((_, cache)) = all.get_mut(&key(owner, provider)) {
            cache.forget(token);
        }
    });
}

/// Keeps a token that was verified.
pub(super) fn keep(owner: &Owner, provider: usize, size: CacheSize, token: &str, jwt: Rc<Jwt>) {
    if token.len() > size.token_bytes {
        return;
    }
    CACHES.with_borrow_mut(|all| {
        let key = key(owner, provider);
        if !all.contains_key(&key) {
            all.retain(|_, (owner, _)| owner.strong_count() > 0);
        }
        let (_, cache) = all.entry(key).or_insert_with(|| (Arc::downgrade(owner), Cache::default()));
        cache.keep(token, jwt, size.tokens);
    });
}

/// An address is not given to another owner while there is a `Weak` to it.
fn key(owner: &Owner, provider: usize) -> (usize, usize) {
    (Arc::as_ptr(owner) as usize, provider)
}

impl Cache {
    fn find(&mut self, token: &str) -> Option<Rc<Jwt>> {
        self.uses += 1;
        let (used, jwt) = self.tokens.get_mut(token)?;
        if let Some(text) = self.order.remove(used) {
            self.order.insert(self.uses, text);
        }
        *used = self.uses;
        Some(jwt.clone())
    }

    fn forget(&mut self, token: &str) {
        if let Some((used, _)) = self.tokens.remove(token) {
            self.order.remove(&used);
        }
    }

    fn keep(&mut self, token: &str, jwt: Rc<Jwt>, most: usize) {
        self.forget(token);
        while self.tokens.len() >= most.max(1)
            && let Some((_, oldest)) = self.order.pop_first()
        {
            self.tokens.remove(&oldest);
        }
        self.uses += 1;
        let text: Rc<str> = token.into();
        self.order.insert(self.uses, text.clone());
        self.tokens.insert(text, (self.uses, jwt));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jwt() -> Rc<Jwt> {
        // {"alg":"HS256"}.{}.AA
        Rc::new(Jwt::parse("eyJhbGciOiJIUzI1NiJ9.e30.AA").unwrap())
    }

    #[test]
    fn what_was_used_least_lately_makes_room() {
        let mut cache = Cache::default();
        cache.keep("a", jwt(), 2);
        cache.keep("b", jwt(), 2);
        assert!(cache.find("a").is_some());
        cache.keep("c", jwt(), 2);
        assert!(cache.find("b").is_none() && cache.find("a").is_some() && cache.find("c").is_some());
        cache.keep("c", jwt(), 2);
        assert_eq!((cache.tokens.len(), cache.order.len()), (2, 2));
        cache.forget("a");
        cache.forget("a");
        assert_eq!((cache.tokens.len(), cache.order.len()), (1, 1));
    }

    #[test]
    fn caches_are_of_one_provider_and_go_with_their_owner() {
        let (owner, other) = (Owner::default(), Owner::default());
        let size = CacheSize { tokens: 1, token_bytes: 3 };
        keep(&owner, 0, size, "abc", jwt());
        keep(&owner, 0, size, "abcd", jwt());
        assert!(find(&owner, 0, "abc").is_some(), "the longer one was not kept");
        assert!(find(&owner, 1, "abc").is_none() && find(&other, 0, "abc").is_none());
        forget(&owner, 0, "abc");
        assert!(find(&owner, 0, "abc").is_none());
        drop(owner);
        keep(&other, 0, size, "abc", jwt());
        assert_eq!(CACHES.with_borrow(HashMap::len), 1);
    }
}
