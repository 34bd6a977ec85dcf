//! The protection of requests and answers: keys, counters, tags, and the log of nonces.

use std::cell::Cell;

use zeroize::Zeroizing;

use crate::behaviour::{CounterOnNewKey, GmacCounter};
use crate::inspect::{NonceKey, NoncePurpose, NonceUse, Refusal};
use crate::meter::{KeyRecord, MeterState};
use crate::security::{CipheredContent, Ciphering, SecurityControl};
use crate::{Error, Obis, SystemTitle};

impl MeterState {
    pub(crate) fn accepts_client(&self, setup: Obis, client: &SystemTitle) -> bool {
        self.setup(setup).is_some_and(|setup| setup.client_titles.as_ref().is_none_or(|titles| titles.contains(client)))
    }

    pub(crate) fn receive_global(
        &mut self,
        setup_name: Obis,
        client: SystemTitle,
        content: &CipheredContent,
        purpose: NoncePurpose,
    ) -> Result<Received, Refusal> {
        let setup = self.setup(setup_name).ok_or(Refusal::NotAllowed)?;
        let generation = setup.guek.generation();
        let received = self.check(
            setup_name,
            client,
            content,
            purpose,
            NonceKey::Unicast { setup: setup_name, generation },
            setup.guek.current().clone(),
        )?;
        if let Some(setup) = self.setup_mut(setup_name) {
            let counters = &mut setup.guek.current_mut().received;
            counters.accept(client, content.counter);
        }
        Ok(received)
    }

    pub(crate) fn receive_broadcast(
        &mut self,
        setup_name: Obis,
        client: SystemTitle,
        content: &CipheredContent,
    ) -> Result<Received, Refusal> {
        let setup = self.setup(setup_name).ok_or(Refusal::NotAllowed)?;
        let gbek = setup.gbek.as_ref().ok_or(Refusal::NotAllowed)?;
        let received = self.check(
            setup_name,
            client,
            content,
            NoncePurpose::Service,
            NonceKey::Broadcast { setup: setup_name, generation: gbek.generation() },
            gbek.current().clone(),
        )?;
        if let Some(gbek) = self.setup_mut(setup_name).and_then(|setup| setup.gbek.as_mut()) {
            let counters = &mut gbek.current_mut().received;
            counters.accept(client, content.counter);
        }
        Ok(received)
    }

    pub(crate) fn receive_dedicated(
        &mut self,
        setup_name: Obis,
        client: SystemTitle,
        dedicated: &mut Dedicated,
        content: &CipheredContent,
    ) -> Result<Received, Refusal> {
        let received = self.check(
            setup_name,
            client,
            content,
            NoncePurpose::Service,
            NonceKey::Dedicated { generation: dedicated.generation },
            dedicated.record.clone(),
        )?;
        dedicated.record.received.accept(client, content.counter);
        Ok(received)
    }

    /// Checks suite, protection, counter and tag, in this order: meters report a stale counter
    /// before they check the tag. The counter is not accepted yet.
    fn check(
        &mut self,
        setup_name: Obis,
        client: SystemTitle,
        content: &CipheredContent,
        purpose: NoncePurpose,
        key: NonceKey,
        record: KeyRecord,
    ) -> Result<Received, Refusal> {
        let setup = self.setup(setup_name).ok_or(Refusal::NotAllowed)?;
        let control = content.control;
        if control.suite_id() != self.suite().id() || control.is_compressed() {
            return Err(Refusal::Deciphering);
        }
        if !control.is_authenticated() || (!control.is_encrypted() && !setup.accept_authenticated_only) {
            return Err(Refusal::NotAllowed);
        }
        let last = record.received.last(setup.counter_scope, &client);
        let ciphering = Ciphering { encryption: record.key, authentication: setup.gak.current().key.clone() };
        let opened = ciphering.open(&client, content);
        let stale = last.filter(|last| content.counter <= *last);
        if let (Ok(_), Some(tag)) = (&opened, content.tag()) {
            self.record_nonce(NonceUse {
                key,
                sender: client,
                counter: content.counter,
                purpose,
                tag,
                accepted: stale.is_none(),
            });
        }
        if let Some(last) = stale {
            return Err(Refusal::Counter { received: content.counter, last });
        }
        Ok(Received {
            plaintext: opened.map_err(|_| Refusal::Deciphering)?,
            ciphering,
            key,
            counter: content.counter,
            counter_before: last,
            ends_association: Cell::new(false),
        })
    }

    pub(crate) fn send_global(
        &mut self,
        setup_name: Obis,
        received: &Received,
        control: SecurityControl,
        plaintext: &[u8],
        purpose: NoncePurpose,
    ) -> Result<CipheredContent, Error> {
        let counter = self.draw_own_counter(setup_name, received)?;
        self.send(received, control, counter, plaintext, purpose)
    }

    pub(crate) fn send_dedicated(
        &mut self,
        dedicated: &mut Dedicated,
        received: &Received,
        control: SecurityControl,
        plaintext: &[u8],
    ) -> Result<CipheredContent, Error> {
        let counter = dedicated.record.draw_own_counter().ok_or(Error::CountersExhausted)?;
        self.send(received, control, counter, plaintext, NoncePurpose::Service)
    }

    fn send(
        &mut self,
        received: &Received,
        control: SecurityControl,
        counter: u32,
        plaintext: &[u8],
        purpose: NoncePurpose,
    ) -> Result<CipheredContent, Error> {
        let title = self.config.system_title;
        let content = received.ciphering.protect(control, &title, counter, plaintext)?;
        if let Some(tag) = content.tag() {
            self.record_nonce(NonceUse { key: received.key, sender: title, counter, purpose, tag, accepted: true });
        }
        Ok(content)
    }

    /// The meter's own next counter under the global key that the request came under.
    fn draw_own_counter(&mut self, setup_name: Obis, received: &Received) -> Result<u32, Error> {
        let keeps_counting = self.config.behaviour.counter_on_new_key == CounterOnNewKey::KeepCounting;
        let setup = self.setup_mut(setup_name).ok_or(Error::State("the security setup is gone"))?;
        let generation = match received.key {
            NonceKey::Unicast { generation, .. } => generation,
            NonceKey::Broadcast { .. } | NonceKey::Dedicated { .. } => setup.guek.generation(),
        };
        let counter =
            setup.guek.record_mut(generation).and_then(KeyRecord::draw_own_counter).ok_or(Error::CountersExhausted)?;
        if keeps_counting && generation != setup.guek.generation() {
            // The answer to a key_transfer leaves under the old key, and later answers under the
            // new one.
            setup.guek.current_mut().go_on_after(counter);
        }
        Ok(counter)
    }

    /// Checks f(StoC) and returns f(CtoS). Both are under the GUEK, and each uses up a counter.
    pub(crate) fn reply_to_hls(
        &mut self,
        setup_name: Obis,
        client: SystemTitle,
        challenges: &Challenges,
        answer: &[u8],
        received: &Received,
    ) -> Result<Vec<u8>, Refusal> {
        let suite = self.suite();
        let setup = self.setup(setup_name).ok_or(Refusal::NotAllowed)?;
        let ciphering =
            Ciphering { encryption: setup.guek.current().key.clone(), authentication: setup.gak.current().key.clone() };
        let key = NonceKey::Unicast { setup: setup_name, generation: setup.guek.generation() };
        let (counter, tag) = ciphering
            .verify_challenge_answer(suite, &client, &challenges.meter, answer)
            .map_err(|_| Refusal::Deciphering)?;
        // Under the GUEK, the APDU around the answer has raised the counter already, so the counter
        // before it is compared. Under a dedicated key, the APDU has another counter.
        let counters = &setup.guek.current().received;
        let last =
            if received.key == key { received.counter_before } else { counters.last(setup.counter_scope, &client) };
        let stale = last.filter(|last| counter <= *last);
        let repeats = received.key == key
            && counter == received.counter
            && self.config.behaviour.gmac_counter == GmacCounter::MustDiffer;
        self.record_nonce(NonceUse {
            key,
            sender: client,
            counter,
            purpose: NoncePurpose::ChallengeAnswer,
            tag,
            accepted: stale.is_none() && !repeats,
        });
        if stale.is_some() || repeats {
            return Err(Refusal::Counter { received: counter, last: stale.unwrap_or(counter) });
        }
        let setup = self.setup_mut(setup_name).ok_or(Refusal::NotAllowed)?;
        let scope = setup.counter_scope;
        let record = setup.guek.current_mut();
        if record.received.last(scope, &client).is_none_or(|last| counter > last) {
            record.received.accept(client, counter);
        }
        let own = record.draw_own_counter().ok_or(Refusal::NotAllowed)?;
        let title = self.config.system_title;
        let returned =
            ciphering.answer_challenge(suite, &title, own, &challenges.client).map_err(|_| Refusal::NotAllowed)?;
        if let Some(tag) = returned.last_chunk().copied() {
            self.record_nonce(NonceUse {
                key,
                sender: title,
                counter: own,
                purpose: NoncePurpose::ChallengeAnswer,
                tag,
                accepted: true,
            });
        }
        Ok(returned)
    }
}

/// A request that passed every check of protection, and the data that its answer needs.
pub(crate) struct Received {
    pub(crate) plaintext: Zeroizing<Vec<u8>>,
    /// The keys that it came under.
    ciphering: Ciphering,
    /// Names the encryption key.
    key: NonceKey,
    counter: u32,
    /// The last accepted counter before this request.
    counter_before: Option<u32>,
    /// Set when HLS failed: the answer still leaves protected.
    pub(crate) ends_association: Cell<bool>,
}

/// The dedicated key of an association.
pub(crate) struct Dedicated {
    pub(crate) generation: usize,
    pub(crate) record: KeyRecord,
}

impl std::fmt::Debug for Dedicated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Dedicated({})", self.generation)
    }
}

/// The challenges of an HLS that is not finished.
#[derive(Debug)]
pub(crate) struct Challenges {
    /// CtoS.
    pub(crate) client: Vec<u8>,
    /// StoC.
    pub(crate) meter: Vec<u8>,
}
