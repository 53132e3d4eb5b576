//! Whether a subscription has had its first answer, for those who wait for it.
//!
//! Ten thousand subscriptions have one each; a channel of tokio's takes ten times the memory.

use std::cell::Cell;
use std::rc::Rc;

use tokio::sync::Notify;

#[derive(Default)]
struct State {
    come: Cell<bool>,
    news: Notify,
}

/// The subscription's side. With its end nothing is awaited any more.
#[derive(Default)]
pub(super) struct Answer(Rc<State>);

/// The side of those who wait.
#[derive(Clone)]
pub(super) struct Awaited(Rc<State>);

impl Answer {
    /// The answer is there, or there will be none.
    pub(super) fn settle(&self) {
        if !self.0.come.replace(true) {
            self.0.news.notify_waiters();
        }
    }

    pub(super) fn is_settled(&self) -> bool {
        self.0.come.get()
    }

    pub(super) fn awaited(&self) -> Awaited {
        Awaited(self.0.clone())
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.settle();
    }
}

impl Awaited {
    pub(super) fn is_settled(&self) -> bool {
        self.0.come.get()
    }

    pub(super) async fn settled(&self) {
        // All is on one thread: nothing comes between the question and the wait.
        while !self.is_settled() {
            self.0.news.notified().await;
        }
    }

    pub(super) async fn all(answers: Vec<Self>) {
        for answer in answers {
            answer.settled().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn who_waits_is_told_of_an_answer_and_of_an_end() {
        let (first, second) = (Answer::default(), Answer::default());
        let (one, two) = (first.awaited(), second.awaited());
        let settle = async {
            assert!(!one.is_settled() && !second.is_settled());
            first.settle();
            tokio::task::yield_now().await;
            drop(second);
        };
        tokio::join!(Awaited::all(vec![one.clone(), two.clone(), one.clone()]), settle);
        assert!(one.is_settled() && two.is_settled() && first.is_settled());
    }
}
