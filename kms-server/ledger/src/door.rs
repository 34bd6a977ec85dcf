//! The one way for a caller to change anything. Every act of a caller passes the door, in this
//! order, in the transaction that writes.
//!
//! | | what happens | kept by |
//! |---|---|---|
//! | 1 | the caller's row is read: an enabled principal, and its certificate (I5) | no act has a view before |
//! | 2 | policy decides (I8) | [`Act::permit`] has no default, and [`Act::decide`] needs its [`Permit`] |
//! | 3 | a repeated request gets its earlier answer, or a refusal (I4) | [`Act::Past`] has no default |
//! | 4 | the act decides, and changes rows | |
//! | 5 | the changes are recorded (I2) | only [`Decision::recorded`] commits rows, keys and rights |
//!
//! The server's own acts have no caller, no policy and no repetition: [`Committer::act`] runs them
//! under a [`ServerAct`](crate::ServerAct). They are recorded like all others.

use std::{
    marker::PhantomData,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use arc_swap::ArcSwap;
use kms_domain::{Principal, RequestId};
use kms_store::{Reads, Store};
use prost::Message;

use super::{
    actor::Actor,
    committer::Committer,
    decision::Decision,
    queued::Committed,
    replay::{Asked, Asking, PastRecord, RecordName, Replay, Window},
    sealed::principal_row,
    view::View,
};
use kms_authz::facts;
use kms_authz::{Action, Caller, Policy, PrincipalFacts, Resource};
use kms_base::error::ServiceError;

/// One thing that a caller may do. The door does what all acts have in common.
///
/// Each method may be called several times: when it uses a row that was not read, and when the
/// transaction of another server came in between. Only the last call counts.
pub trait Act: Send + Sync + 'static {
    /// What the caller gets. A replay gets the same, or a refusal.
    type Answer: Send + 'static;
    /// What is kept of an answer, for a request that comes again: [`Never`], [`Known`],
    /// [`Remembered`] or [`ByRecord`].
    type Past: Past<Self::Answer>;

    /// The name under which refusals are recorded: that of the action in policies, where there is
    /// one.
    fn name(&self) -> &'static str;

    /// The rows that it uses. The door adds those of the caller and of the request. A row that is
    /// missing here is read when it is used, and the act decides again.
    fn reads(&self) -> Reads;

    /// The permit by policy, on the rows as they are in the transaction (I8). A repeated request
    /// needs it too.
    ///
    /// # Errors
    /// Not permitted; or a row was not read yet, or does not verify.
    fn permit(&self, asker: Asker, view: &mut View<'_, '_>) -> Result<Permit, ServiceError>;

    /// Decides a request that was not answered before, and changes rows.
    ///
    /// # Errors
    /// Why it is refused. Nothing is written then, and the refusal is on the record.
    fn decide(&self, permit: &Permit, view: &mut View<'_, '_>) -> Result<Decision<Self::Answer>, ServiceError>;

    /// The answer to the same request once more. It changes nothing.
    ///
    /// # Errors
    /// The answer cannot be given again.
    fn again(&self, past: Self::Past, permit: &Permit, view: &mut View<'_, '_>) -> Result<Self::Answer, ServiceError>;
}

impl<A: Act> Act for Arc<A> {
    type Answer = A::Answer;
    type Past = A::Past;

    fn name(&self) -> &'static str {
        A::name(self)
    }

    fn reads(&self) -> Reads {
        A::reads(self)
    }

    fn permit(&self, asker: Asker, view: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        A::permit(self, asker, view)
    }

    fn decide(&self, permit: &Permit, view: &mut View<'_, '_>) -> Result<Decision<Self::Answer>, ServiceError> {
        A::decide(self, permit, view)
    }

    fn again(&self, past: Self::Past, permit: &Permit, view: &mut View<'_, '_>) -> Result<Self::Answer, ServiceError> {
        A::again(self, past, permit, view)
    }
}

/// A request to change something, by what makes it the same request when it comes again.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Its id.
    pub id: RequestId,
    /// Digest of the whole request without its id.
    pub digest: [u8; 32],
}

impl Request {
    /// One chunk of the request, from 0. Each chunk is answered and remembered on its own.
    #[must_use]
    pub const fn chunk(self, chunk: u32) -> RequestChunk {
        RequestChunk { request: self, chunk }
    }
}

/// One chunk of a request. A request that has no chunks is its own chunk 0.
#[derive(Clone, Copy, Debug)]
pub struct RequestChunk {
    request: Request,
    chunk: u32,
}

impl From<Request> for RequestChunk {
    fn from(request: Request) -> Self {
        request.chunk(0)
    }
}

/// The principal of a request, with the policies that decide. The row of the principal was verified
/// in this transaction.
pub struct Asker {
    principal: Arc<Principal>,
    facts: PrincipalFacts,
    policy: Arc<Policy>,
}

impl Asker {
    /// The asker for a principal whose row was just verified. Besides the door, calls that only
    /// read use this, and work before an act that the act would refuse.
    pub fn new(principal: Arc<Principal>, policy: Arc<Policy>) -> Self {
        Self { facts: facts(&principal), principal, policy }
    }

    /// The principal.
    pub const fn principal(&self) -> &Arc<Principal> {
        &self.principal
    }

    /// Whether policy permits it.
    pub fn permits(&self, action: &Action, resource: &Resource<'_>) -> bool {
        self.policy.permits(&self.facts, action, resource).is_permit()
    }

    /// The permit for an act that is one action on one resource.
    ///
    /// # Errors
    /// Permission denied, naming the action.
    pub fn require(self, action: &Action, resource: &Resource<'_>) -> Result<Permit, ServiceError> {
        self.policy.require(&self.facts, action, resource)?;
        Ok(Permit::of(self, false))
    }

    /// As [`Self::require`], with a refusal that says more about the request.
    ///
    /// # Errors
    /// The value of `refusal`.
    pub fn require_or(
        self,
        action: &Action,
        resource: &Resource<'_>,
        refusal: impl FnOnce() -> ServiceError,
    ) -> Result<Permit, ServiceError> {
        if self.permits(action, resource) { Ok(Permit::of(self, false)) } else { Err(refusal()) }
    }

    /// The permit for an act on many rows, which asks for each of them by [`Permit::permits`] or
    /// [`Permit::require`] before it touches it (I8).
    pub fn each(self) -> Permit {
        Permit::of(self, true)
    }

    /// The permit for an act that no policy decides on. `_reason` says why.
    pub fn without_policy(self, _reason: &'static str) -> Permit {
        Permit::of(self, false)
    }
}

/// The permission to act. [`Act::decide`] gets the permit that [`Act::permit`] has made in the same
/// transaction.
pub struct Permit {
    asker: Asker,
    /// The act asks policy for each item.
    each: bool,
    /// The act has asked policy.
    asked: AtomicBool,
}

impl Permit {
    const fn of(asker: Asker, each: bool) -> Self {
        Self { asker, each, asked: AtomicBool::new(false) }
    }

    /// I8: an act that asks for each item, and has asked for none, was permitted nothing.
    fn permits_something(&self) -> bool {
        !self.each || self.asked.load(Ordering::Relaxed)
    }

    /// The principal that acts.
    pub const fn principal(&self) -> &Arc<Principal> {
        &self.asker.principal
    }

    /// The asker, for functions that ask policy both before an act and in it. To take the asker
    /// counts as asking policy for an item (I8): whoever takes it must ask.
    pub fn asker(&self) -> &Asker {
        self.asked.store(true, Ordering::Relaxed);
        &self.asker
    }

    /// The policies and quotas that decide on the act.
    pub const fn policy(&self) -> &Arc<Policy> {
        &self.asker.policy
    }

    /// Whether policy permits one item of an act on many, or a further action.
    pub fn permits(&self, action: &Action, resource: &Resource<'_>) -> bool {
        self.asked.store(true, Ordering::Relaxed);
        self.asker.permits(action, resource)
    }

    /// As [`Self::permits`], as a result.
    ///
    /// # Errors
    /// Permission denied, naming the action.
    pub fn require(&self, action: &Action, resource: &Resource<'_>) -> Result<(), ServiceError> {
        self.asked.store(true, Ordering::Relaxed);
        self.asker.policy.require(&self.asker.facts, action, resource)
    }
}

/// What is kept of an answer, for a request that comes again.
pub trait Past<A>: Sized + Send + 'static {
    /// How a caller names the request.
    type Request: Send + 'static;

    /// The request's id, for the record.
    fn id(request: &Self::Request) -> Option<RequestId>;
    /// How the request is remembered. None: it is not.
    fn asking(request: &Self::Request, caller: &Caller) -> Option<Asking>;
    /// Whether the request was answered before. `record` is the record of its answer, once it was
    /// read.
    ///
    /// # Errors
    /// Its id was used for another request, it is too old, or its row does not verify.
    fn find(
        view: &mut View<'_, '_>,
        asking: &Asking,
        record: Option<&Arc<PastRecord>>,
    ) -> Result<Found<Self>, ServiceError>;
    /// Remembers the answer.
    fn remember(view: &mut View<'_, '_>, asking: &Asking, decision: &Decision<A>);
}

/// Whether a request was answered before.
#[derive(Debug)]
pub enum Found<P> {
    /// It was not. It is decided on now.
    First,
    /// It was.
    Before(P),
    /// It was, but its audit record was not read yet.
    Unread(RecordName),
}

/// Nothing is kept: the act's own rows say that it is done, or each call is a new request. A call
/// may still have an id, for the record.
#[derive(Clone, Copy, Debug)]
pub enum Never {}

impl<A> Past<A> for Never {
    type Request = Option<RequestId>;

    fn id(request: &Self::Request) -> Option<RequestId> {
        *request
    }

    fn asking(_: &Self::Request, _: &Caller) -> Option<Asking> {
        None
    }

    fn find(_: &mut View<'_, '_>, _: &Asking, _: Option<&Arc<PastRecord>>) -> Result<Found<Self>, ServiceError> {
        Ok(Found::First)
    }

    fn remember(_: &mut View<'_, '_>, _: &Asking, _: &Decision<A>) {}
}

/// For how long answers are kept.
pub trait Keep: Send + 'static {
    /// The time in which a request can be repeated.
    const WINDOW: Window;
}

/// 24 hours: administration.
#[derive(Clone, Copy, Debug)]
pub enum Administration {}

/// 15 minutes: keys or frames leave.
#[derive(Clone, Copy, Debug)]
pub enum Keys {}

impl Keep for Administration {
    const WINDOW: Window = Window::Administration;
}

impl Keep for Keys {
    const WINDOW: Window = Window::Keys;
}

/// It is kept that the request was answered. The answer is read from the rows as they are.
#[derive(Clone, Copy, Debug)]
pub struct Known<K = Administration>(PhantomData<fn() -> K>);

impl<A, K: Keep> Past<A> for Known<K> {
    type Request = Request;

    fn id(request: &Self::Request) -> Option<RequestId> {
        Some(request.id)
    }

    fn asking(request: &Self::Request, caller: &Caller) -> Option<Asking> {
        Some(Asking::new(caller, request.id, request.digest, K::WINDOW))
    }

    fn find(
        view: &mut View<'_, '_>,
        asking: &Asking,
        _: Option<&Arc<PastRecord>>,
    ) -> Result<Found<Self>, ServiceError> {
        Ok(match view.asked(asking)? {
            Asked::First => Found::First,
            Asked::Before(_) => Found::Before(Self(PhantomData)),
        })
    }

    fn remember(view: &mut View<'_, '_>, asking: &Asking, decision: &Decision<A>) {
        if decision.is_recorded() {
            view.answered(asking);
        } else {
            view.answered_with(asking, &());
        }
    }
}

/// The answer itself is kept for 24 hours. It never holds a key.
#[derive(Clone, Debug)]
pub struct Remembered<M>(pub M);

impl<M: Message + Default + Send + 'static> Past<M> for Remembered<M> {
    type Request = RequestChunk;

    fn id(chunk: &Self::Request) -> Option<RequestId> {
        Some(chunk.request.id)
    }

    fn asking(RequestChunk { request, chunk }: &Self::Request, caller: &Caller) -> Option<Asking> {
        Some(Asking::new(caller, request.id, request.digest, Administration::WINDOW).chunk(*chunk))
    }

    fn find(
        view: &mut View<'_, '_>,
        asking: &Asking,
        _: Option<&Arc<PastRecord>>,
    ) -> Result<Found<Self>, ServiceError> {
        Ok(match view.asked(asking)? {
            Asked::First => Found::First,
            Asked::Before(answered) => Found::Before(Self(answered.message()?)),
        })
    }

    fn remember(view: &mut View<'_, '_>, asking: &Asking, decision: &Decision<M>) {
        view.answered_with(asking, decision.answer());
    }
}

/// For acts by which keys or frames leave. The audit record says what left (I2): it is read, and
/// compared with what would leave now (I4). Kept for 15 minutes.
#[derive(Clone, Debug)]
pub struct ByRecord(pub Arc<PastRecord>);

impl<A> Past<A> for ByRecord {
    type Request = RequestChunk;

    fn id(chunk: &Self::Request) -> Option<RequestId> {
        Some(chunk.request.id)
    }

    fn asking(RequestChunk { request, chunk }: &Self::Request, caller: &Caller) -> Option<Asking> {
        Some(Asking::new(caller, request.id, request.digest, Keys::WINDOW).chunk(*chunk))
    }

    fn find(
        view: &mut View<'_, '_>,
        asking: &Asking,
        record: Option<&Arc<PastRecord>>,
    ) -> Result<Found<Self>, ServiceError> {
        Ok(match (view.replay(asking, record.map(AsRef::as_ref))?, record) {
            (Replay::Read(name), _) => Found::Unread(name),
            (Replay::Again, Some(record)) => Found::Before(Self(Arc::clone(record))),
            (Replay::First | Replay::Again, _) => Found::First,
        })
    }

    fn remember(view: &mut View<'_, '_>, asking: &Asking, decision: &Decision<A>) {
        // An act that is not recorded has let nothing leave.
        if decision.is_recorded() {
            view.answered(asking);
        }
    }
}

/// The one way for a caller to change anything. Cheap to clone.
#[derive(Clone)]
pub struct Door {
    committer: Committer,
    store: Arc<dyn Store>,
    policy: Arc<ArcSwap<Policy>>,
}

impl Door {
    /// The door of an island.
    pub const fn new(committer: Committer, store: Arc<dyn Store>, policy: Arc<ArcSwap<Policy>>) -> Self {
        Self { committer, store, policy }
    }

    /// Runs an act of a caller, or repeats the answer of the same request. When this returns, the
    /// changes are durable, with their record (I2).
    ///
    /// # Errors
    /// The caller is not an enabled principal, or its certificate has ended (I5); policy does not
    /// permit the act (I8); the request's id was used for another request; what the act refuses;
    /// [`ServiceError::ResourceExhausted`] if the caller has met a bound; or
    /// [`ServiceError::Unavailable`].
    pub async fn act<A: Act>(
        &self,
        caller: &Caller,
        request: impl Into<<A::Past as Past<A::Answer>>::Request>,
        act: A,
    ) -> Result<Committed<A::Answer>, ServiceError> {
        let request = request.into();
        let asking = A::Past::asking(&request, caller);
        let mut reads = act.reads();
        reads.sealed.push(principal_row(&caller.principal));
        reads.requests.extend(asking.iter().flat_map(Asking::reads));
        let actor = Actor::caller(caller, A::Past::id(&request), act.name());
        let mut passing = Passing {
            act: Arc::new(act),
            caller: caller.clone(),
            policy: Arc::clone(&self.policy),
            asking,
            record: None,
        };
        let mut first = passing.clone();
        let mut committed = self.committer.enqueue(actor.clone(), reads.clone(), move |view| first.pass(view)).await?;
        if let Passed::Unread(name) = committed.value {
            // The rows are compared with the record.
            passing.record = Some(Arc::new(name.read(self.store.as_ref()).await?));
            committed = self.committer.enqueue(actor, reads, move |view| passing.pass(view)).await?;
        }
        match committed.value {
            Passed::Answer(value) => Ok(Committed { value, leaves: committed.leaves }),
            Passed::Unread(_) => Err(ServiceError::Internal("a repeated request was not decided".to_owned())),
        }
    }
}

/// An act on its way through the door.
struct Passing<A> {
    act: Arc<A>,
    caller: Caller,
    policy: Arc<ArcSwap<Policy>>,
    asking: Option<Asking>,
    record: Option<Arc<PastRecord>>,
}

impl<A> Clone for Passing<A> {
    fn clone(&self) -> Self {
        Self {
            act: Arc::clone(&self.act),
            caller: self.caller.clone(),
            policy: Arc::clone(&self.policy),
            asking: self.asking.clone(),
            record: self.record.clone(),
        }
    }
}

enum Passed<T> {
    Answer(T),
    Unread(RecordName),
}

impl<A: Act> Passing<A> {
    fn pass(&mut self, view: &mut View<'_, '_>) -> Result<Decision<Passed<A::Answer>>, ServiceError> {
        let asker = Asker::new(view.caller(&self.caller)?, self.policy.load_full());
        let permit = self.act.permit(asker, view)?;
        let found = match &self.asking {
            Some(asking) => A::Past::find(view, asking, self.record.as_ref())?,
            None => Found::First,
        };
        match found {
            Found::First => {
                let decision = self.act.decide(&permit, view)?;
                if decision.is_recorded() && !permit.permits_something() {
                    let name = self.act.name();
                    return Err(ServiceError::Internal(format!("the act `{name}` asked policy about nothing (I8)")));
                }
                if let Some(asking) = self.asking.as_ref().filter(|_| !decision.is_forgotten()) {
                    A::Past::remember(view, asking, &decision);
                }
                Ok(decision.map(Passed::Answer))
            }
            Found::Before(past) => self.act.again(past, &permit, view).map(Passed::Answer).map(Decision::unchanged),
            Found::Unread(name) => Ok(Decision::unchanged(Passed::Unread(name))),
        }
    }
}
