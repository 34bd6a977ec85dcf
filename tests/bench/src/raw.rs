//! Cycles against the module itself, through the cryptoki crate: what the server's rates are
//! compared with.

use std::{
    collections::BTreeMap,
    num::NonZeroUsize,
    path::Path,
    process::Command,
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

use cryptoki::{
    context::{CInitializeArgs, CInitializeFlags, Pkcs11},
    mechanism::{
        Mechanism, MechanismType,
        ekdf::AesCbcDeriveParams,
        kbkdf::{
            Endianness, KbkdfCounterFormat, KbkdfDkmLengthFormat, KbkdfDkmLengthMethod, KbkdfParams, PrfDataParam,
            PrfDataParamType,
        },
    },
    object::{Attribute, KeyType, ObjectClass, ObjectHandle},
    session::{Session, UserType},
    types::AuthPin,
};

use crate::{
    Failure,
    measure::{memory_mib, per_second},
    module::Module,
};

/// Cycles a second, by name.
pub(crate) type Rates = BTreeMap<String, f64>;

/// A stored key: unwrap + wrap + destroy, on one thread and on two.
pub(crate) const STORED: &str = "unwrap + wrap + destroy, 1 thread";
pub(crate) const STORED_TWO: &str = "unwrap + wrap + destroy, 2 threads";
/// The same with a second wrap.
pub(crate) const STORED_WRAPPED_TWICE: &str = "unwrap + 2 × wrap + destroy, 1 thread";
/// A diversified key.
pub(crate) const DERIVED_CBC: &str = "derive (AES-CBC-ENCRYPT-DATA) + wrap + destroy, 1 thread";
pub(crate) const DERIVED_SP800_108: &str = "derive (SP 800-108 counter, CMAC) + wrap + destroy, 1 thread";

/// A new, diversified key for a meter whose KEK is stored.
pub(crate) const TRANSFER_CBC: &str =
    "new key for a meter: unwrap KEK + derive (AES-CBC-ENCRYPT-DATA) + wrap + 2 × destroy, 1 thread";
pub(crate) const TRANSFER_SP800_108: &str =
    "new key for a meter: unwrap KEK + derive (SP 800-108 counter, CMAC) + wrap + 2 × destroy, 1 thread";

/// The name of the module, and its rates.
#[derive(serde::Deserialize, serde::Serialize)]
pub(crate) struct Raw {
    pub(crate) library: String,
    pub(crate) rates: Rates,
    /// Octets by which a cycle makes the process grow for good: what a module keeps of objects that
    /// were destroyed.
    pub(crate) octets_left: f64,
}

impl Raw {
    /// Measures in a process of its own: a module reads its configuration from the environment when
    /// it is loaded.
    pub(crate) fn measure(module: Module, directory: &Path, time: Duration) -> Result<Self, Failure> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("raw").arg(module.path()?).arg(time.as_millis().to_string()).envs(module.environment(directory)?);
        let output = command.stderr(std::process::Stdio::inherit()).output()?;
        if !output.status.success() {
            return Err(format!("measuring {} directly failed: {}", module.name(), output.status).into());
        }
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// What the process does.
    pub(crate) fn in_process(path: &Path, time: Duration) -> Result<Self, Failure> {
        let context = Pkcs11::new(path)?;
        context.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK))?;
        let info = context.get_library_info()?;
        let library =
            format!("{} {}.{}", info.manufacturer_id(), info.library_version().major(), info.library_version().minor());
        let (bench, _login) = Bench::new(&context, time / ROUNDS)?;
        let has_sp800_108 = context.get_mechanism_list(bench.slot)?.contains(&MechanismType::SP800_108_COUNTER_KDF);
        let mut rates = Rates::new();
        let (memory, mut cycles) = (memory_mib("self", "VmRSS"), 0.0);
        // The best of several rounds: what the module can do, and the hardest to compare with.
        for _ in 0..ROUNDS {
            let mut take = |name: &str, rate: f64| {
                let best = rates.entry(name.to_owned()).or_insert(rate);
                *best = best.max(rate);
                cycles += rate * bench.time.as_secs_f64();
            };
            take(STORED, bench.rate(1, Bench::stored)?);
            take(STORED_TWO, bench.rate(2, Bench::stored)?);
            take(STORED_WRAPPED_TWICE, bench.rate(1, Bench::stored_wrapped_twice)?);
            take(DERIVED_CBC, bench.rate(1, Bench::derived_cbc)?);
            take(TRANSFER_CBC, bench.rate(1, Bench::transfer_cbc)?);
            if has_sp800_108 {
                take(DERIVED_SP800_108, bench.rate(1, Bench::derived_sp800_108)?);
                take(TRANSFER_SP800_108, bench.rate(1, Bench::transfer_sp800_108)?);
            }
        }
        let octets_left = (memory_mib("self", "VmRSS") - memory) * 1_048_576.0 / cycles;
        Ok(Self { library, rates, octets_left })
    }
}

/// A token with the keys of one cycle: as in the server, those that stay are token objects.
struct Bench<'a> {
    context: &'a Pkcs11,
    slot: cryptoki::slot::Slot,
    time: Duration,
    storage_kek: ObjectHandle,
    diversification_root: ObjectHandle,
    wrapped: Vec<u8>,
}

impl<'a> Bench<'a> {
    /// With the session that holds the login.
    fn new(context: &'a Pkcs11, time: Duration) -> Result<(Self, Session), Failure> {
        let pin = AuthPin::new("bench-12345678".into());
        let slot = context.get_slots_with_token()?.into_iter().next().ok_or("the module has no slot")?;
        context.init_token(slot, &pin, "bench")?;
        // SoftHSM moves a token that was initialised to another slot.
        let slot = context.get_slots_with_initialized_token()?.into_iter().next().ok_or("the module has no token")?;
        let session = context.open_rw_session(slot)?;
        session.login(UserType::So, Some(&pin))?;
        session.init_pin(&pin)?;
        session.logout()?;
        session.login(UserType::User, Some(&pin))?;
        let stays = |length: u64, usage: &[Attribute]| {
            [
                &[
                    Attribute::Token(true),
                    Attribute::ValueLen(length.into()),
                    Attribute::Sensitive(true),
                    Attribute::Extractable(false),
                ],
                usage,
            ]
            .concat()
        };
        let storage_kek = session
            .generate_key(&Mechanism::AesKeyGen, &stays(32, &[Attribute::Wrap(true), Attribute::Unwrap(true)]))?;
        let diversification_root =
            session.generate_key(&Mechanism::AesKeyGen, &stays(32, &[Attribute::Derive(true)]))?;
        let key = session.generate_key(
            &Mechanism::AesKeyGen,
            &[Attribute::Token(false), Attribute::ValueLen(16.into()), Attribute::Extractable(true)],
        )?;
        let mut wrapped = session.wrap_key(&Mechanism::AesKeyWrap, storage_kek, key)?;
        // SoftHSM gives the buffer that it would have liked; RFC 3394 makes 24 octets of 16.
        wrapped.truncate(24);
        Ok((Self { context, slot, time, storage_kek, diversification_root, wrapped }, session))
    }

    /// Cycles a second of all threads, each with a session and a transport KEK of its own.
    fn rate(
        &self,
        threads: usize,
        cycle: impl Fn(&Self, &Session, ObjectHandle) -> cryptoki::error::Result<()> + Copy + Send + Sync,
    ) -> Result<f64, Failure> {
        let ready = Barrier::new(threads);
        let work = || -> Result<(u64, Duration), Failure> {
            let prepared = self.context.open_rw_session(self.slot).and_then(|session| {
                let kek = [
                    Attribute::Token(false),
                    Attribute::ValueLen(32.into()),
                    Attribute::Sensitive(true),
                    Attribute::Wrap(true),
                ];
                let transport_kek = session.generate_key(&Mechanism::AesKeyGen, &kek)?;
                Ok((session, transport_kek))
            });
            ready.wait();
            let (session, transport_kek) = prepared?;
            let (begun, mut done) = (Instant::now(), 0);
            while begun.elapsed() < self.time {
                for _ in 0..CYCLES_BETWEEN_LOOKS_AT_THE_CLOCK {
                    cycle(self, &session, transport_kek)?;
                }
                done += CYCLES_BETWEEN_LOOKS_AT_THE_CLOCK;
            }
            Ok((done, begun.elapsed()))
        };
        thread::scope(|scope| {
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            workers.into_iter().try_fold(0.0, |sum, worker| {
                let (done, time) = worker.join().map_err(|_| "a measuring thread panicked")??;
                Ok(sum + per_second(done, time))
            })
        })
    }

    fn stored(&self, session: &Session, transport_kek: ObjectHandle) -> cryptoki::error::Result<()> {
        let key = session.unwrap_key(&Mechanism::AesKeyWrap, self.storage_kek, &self.wrapped, &UNWRAPPED)?;
        session.wrap_key(&Mechanism::AesKeyWrap, transport_kek, key)?;
        session.destroy_object(key)
    }

    fn stored_wrapped_twice(&self, session: &Session, transport_kek: ObjectHandle) -> cryptoki::error::Result<()> {
        let key = session.unwrap_key(&Mechanism::AesKeyWrap, self.storage_kek, &self.wrapped, &UNWRAPPED)?;
        session.wrap_key(&Mechanism::AesKeyWrap, transport_kek, key)?;
        session.wrap_key(&Mechanism::AesKeyWrap, transport_kek, key)?;
        session.destroy_object(key)
    }

    fn derived_cbc(&self, session: &Session, transport_kek: ObjectHandle) -> cryptoki::error::Result<()> {
        let key = self.derive_cbc(session)?;
        session.wrap_key(&Mechanism::AesKeyWrap, transport_kek, key)?;
        session.destroy_object(key)
    }

    fn derived_sp800_108(&self, session: &Session, transport_kek: ObjectHandle) -> cryptoki::error::Result<()> {
        let key = self.derive_sp800_108(session)?;
        session.wrap_key(&Mechanism::AesKeyWrap, transport_kek, key)?;
        session.destroy_object(key)
    }

    fn transfer_cbc(&self, session: &Session, _: ObjectHandle) -> cryptoki::error::Result<()> {
        self.transfer(session, Self::derive_cbc)
    }

    fn transfer_sp800_108(&self, session: &Session, _: ObjectHandle) -> cryptoki::error::Result<()> {
        self.transfer(session, Self::derive_sp800_108)
    }

    fn transfer(
        &self,
        session: &Session,
        derive: impl FnOnce(&Self, &Session) -> cryptoki::error::Result<ObjectHandle>,
    ) -> cryptoki::error::Result<()> {
        let [class, key_type, token, sensitive, _] = UNWRAPPED;
        let kek = session.unwrap_key(
            &Mechanism::AesKeyWrap,
            self.storage_kek,
            &self.wrapped,
            &[class, key_type, token, sensitive, Attribute::Wrap(true)],
        )?;
        let key = derive(self, session)?;
        session.wrap_key(&Mechanism::AesKeyWrap, kek, key)?;
        session.destroy_object(key)?;
        session.destroy_object(kek)
    }

    fn derive_cbc(&self, session: &Session) -> cryptoki::error::Result<ObjectHandle> {
        session.derive_key(
            &Mechanism::AesCbcEncryptData(AesCbcDeriveParams::new([0; 16], &[0x5A; 16])),
            self.diversification_root,
            &derived(),
        )
    }

    fn derive_sp800_108(&self, session: &Session) -> cryptoki::error::Result<ObjectHandle> {
        let counter = KbkdfCounterFormat::new(Endianness::Big, BITS);
        let length = KbkdfDkmLengthFormat::new(KbkdfDkmLengthMethod::SumOfKeys, Endianness::Big, BITS);
        let data = [
            PrfDataParam::new(PrfDataParamType::IterationVariable(Some(&counter))),
            PrfDataParam::new(PrfDataParamType::ByteArray(&[0x5A; 17])),
            PrfDataParam::new(PrfDataParamType::DkmLength(&length)),
        ];
        let mechanism = Mechanism::KbkdfCounter(KbkdfParams::new(MechanismType::AES_CMAC, &data, None));
        session.derive_key(&mechanism, self.diversification_root, &derived())
    }
}

fn derived() -> [Attribute; 6] {
    let [class, key_type, token, sensitive, extractable] = UNWRAPPED;
    [class, key_type, token, sensitive, extractable, Attribute::ValueLen(16.into())]
}

const UNWRAPPED: [Attribute; 5] = [
    Attribute::Class(ObjectClass::SECRET_KEY),
    Attribute::KeyType(KeyType::AES),
    Attribute::Token(false),
    Attribute::Sensitive(true),
    Attribute::Extractable(true),
];
const BITS: NonZeroUsize = match NonZeroUsize::new(32) {
    Some(bits) => bits,
    None => NonZeroUsize::MIN,
};
const ROUNDS: u32 = 3;
const CYCLES_BETWEEN_LOOKS_AT_THE_CLOCK: u64 = 64;
