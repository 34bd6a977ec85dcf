//! The HSM that fails on demand: the control file, written while the module runs. Its format is in
//! hsm-sim's README.
#![expect(unsafe_code, reason = "calls into a C interface")]
#![expect(clippy::unwrap_used, reason = "test helpers: a failure is to stop the test")]

#[macro_use]
mod common;

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use common::{Mechanism, Module, Result, Template, Token, USER_PIN, folder, hsm_sim, name};
use cryptoki_sys::*;

/// The one control file of this process: a test holds it for its time, and leaves it empty.
struct ControlFile {
    module: &'static Module,
    _alone: MutexGuard<'static, ()>,
}

impl ControlFile {
    fn take() -> Self {
        static ONE: Mutex<()> = Mutex::new(());
        let _alone = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let control = Self { module: hsm_sim(), _alone };
        control.write("");
        control
    }

    fn write(&self, rules: &str) {
        write(self.module, rules);
    }
}

/// Replaces the content at once, and waits until the module has read it: a last rule makes
/// C_GetInfo tell.
fn write(module: &Module, rules: &str) {
    static VERSION: Mutex<usize> = Mutex::new(0);
    let mut version = VERSION.lock().unwrap();
    *version += 1;
    let (code, marker) = if version.is_multiple_of(2) {
        ("CKR_DEVICE_MEMORY", CKR_DEVICE_MEMORY)
    } else {
        ("CKR_HOST_MEMORY", CKR_HOST_MEMORY)
    };
    let (file, part) = (folder().join("control"), folder().join("control.part"));
    std::fs::write(&part, format!("{rules}\nfail C_GetInfo {code}\n")).unwrap();
    std::fs::rename(part, file).unwrap();
    await_that("the control file is read", || {
        let mut info = CK_INFO::default();
        call!(module, C_GetInfo, &raw mut info) == Err(marker)
    });
}

impl Drop for ControlFile {
    fn drop(&mut self) {
        let _ = std::fs::write(folder().join("control"), "");
    }
}

fn await_that(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < FOR_EVER, "waited for ever: {what}");
        std::thread::yield_now();
    }
}

/// Does something on a thread of its own: it fails when that never ends.
fn in_time<T: Send + 'static>(what: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || tell.send(work()));
    told.recv_timeout(FOR_EVER).map_err(|error| format!("waited for ever: {what} ({error})")).unwrap()
}

/// Long after whatever a busy machine needs, and before the test command is stopped.
const FOR_EVER: Duration = Duration::from_secs(120);

fn ecb() -> Mechanism {
    Mechanism::plain(CKM_AES_ECB)
}

fn outcomes(count: usize, mut call: impl FnMut() -> Result<()>) -> Vec<Result<()>> {
    (0..count).map(|_| call()).collect()
}

#[test]
fn the_nth_call_fails_as_told() {
    let control = ControlFile::take();
    let token = Token::fresh("nth");
    let (module, session) = (token.module, token.session);
    let key = token.aes(&[1; 16], Template::new());
    let encrypt = || module.encrypt(session, &ecb(), key, &[0; 16]).map(drop);

    control.write("fail C_Encrypt nth=3 CKR_DEVICE_ERROR");
    let device_error = Err(CKR_DEVICE_ERROR);
    // A call that fails before its work leaves its operation active: begin anew.
    let mut results = Vec::new();
    for _ in 0..5 {
        results.push(encrypt());
        let _ = call3!(module, C_SessionCancel, session, CKF_ENCRYPT);
    }
    assert_eq!(results, [Ok(()), Ok(()), device_error, Ok(()), Ok(())]);

    control.write("fail C_EncryptInit nth=2 count=2 CKR_FUNCTION_FAILED");
    assert_eq!(outcomes(5, encrypt), [Ok(()), Err(CKR_FUNCTION_FAILED), Err(CKR_FUNCTION_FAILED), Ok(()), Ok(())]);

    control.write("fail C_EncryptInit every=2 CKR_GENERAL_ERROR");
    assert_eq!(outcomes(4, encrypt), [Ok(()), Err(CKR_GENERAL_ERROR), Ok(()), Err(CKR_GENERAL_ERROR)]);

    control.write("fail C_EncryptInit CKR_DEVICE_ERROR");
    assert_eq!(outcomes(3, encrypt), [device_error; 3]);
    module.sign(session, &Mechanism::plain(CKM_AES_CMAC), key, &[0; 16]).expect("other functions work");

    control.write("");
    assert_eq!(outcomes(3, encrypt), [Ok(()); 3]);
}

#[test]
fn chance_fails_some() {
    let control = ControlFile::take();
    let token = Token::fresh("chance");
    let (module, session) = (token.module, token.session);
    control.write("fail C_GenerateRandom probability=0.5 CKR_DEVICE_ERROR");
    let failed = (0..400).filter(|_| module.random(session, 8).is_err()).count();
    assert!((100..300).contains(&failed), "{failed} of 400");
}

#[test]
fn calls_take_the_time_that_is_said() {
    let control = ControlFile::take();
    let token = Token::fresh("slow");
    let (module, session) = (token.module, token.session);
    // A call never takes less than is said; how much more is up to the machine.
    let least = |calls: u32| {
        let start = Instant::now();
        for _ in 0..calls {
            module.random(session, 8).unwrap();
        }
        start.elapsed() / calls
    };
    control.write("latency C_GenerateRandom 20ms");
    assert!(least(3) >= Duration::from_millis(20));
    control.write("latency C_GenerateRandom 5ms..10ms");
    assert!(least(5) >= Duration::from_millis(5));
    control.write("latency C_GenerateRandom lognormal 5ms 0");
    assert!(least(5) >= Duration::from_millis(5));
    control.write("latency C_Encrypt 3600s");
    in_time("another function is as fast as ever", move || module.random(session, 8).map(drop)).unwrap();
}

/// A slow call keeps no one else waiting: one is in the module for an hour, others come and go.
#[test]
fn slowness_is_not_shared() {
    let control = ControlFile::take();
    let token = Token::fresh("side by side");
    let (module, slot) = (token.module, token.slot);
    control.write("latency C_GenerateRandom 3600s");
    let (tell, told) = mpsc::channel();
    // It ends with the process.
    std::thread::spawn(move || {
        let session = module.open(slot, 0).unwrap();
        tell.send(std::fs::read_link("/proc/thread-self").unwrap()).unwrap();
        module.random(session, 8)
    });
    let slow = PathBuf::from("/proc").join(told.recv().unwrap()).join("stat");
    await_that("the slow call is asleep", || {
        // The state comes after the name, which is in parentheses.
        std::fs::read_to_string(&slow).unwrap().rsplit(") ").next().unwrap().starts_with('S')
    });
    in_time("calls beside a slow one", move || {
        write(module, "");
        (0..8).try_for_each(|_| {
            let session = module.open(slot, 0)?;
            module.random(session, 8)?;
            module.close(session)
        })
    })
    .unwrap();
}

#[test]
fn sessions_are_dropped() {
    let control = ControlFile::take();
    let token = Token::fresh("dropped");
    let (module, session) = (token.module, token.session);
    let key = module.create(session, &Template::aes(&[1; 16]).bool(CKA_TOKEN, true).bytes(CKA_LABEL, "root")).unwrap();
    let volatile = token.aes(&[2; 16], Template::new());
    control.write("drop-sessions id=first");
    let code = module.encrypt(session, &ecb(), key, &[0; 16]).unwrap_err();
    assert!([CKR_SESSION_HANDLE_INVALID, CKR_SESSION_CLOSED].contains(&code), "{}", name(code));
    // Once only: a session opened now stays, though the line is still there.
    let session = module.open_rw(token.slot).unwrap();
    assert_eq!(module.session_state(session), Ok(CKS_RW_PUBLIC_SESSION), "the login went with the sessions");
    module.login(session, CKU_USER, USER_PIN).unwrap();
    let found = module.find(session, &Template::new().bytes(CKA_LABEL, "root")).unwrap();
    module.encrypt(session, &ecb(), found[0], &[0; 16]).unwrap();
    assert_eq!(
        module.get(session, volatile, CKA_LABEL),
        Err(CKR_OBJECT_HANDLE_INVALID),
        "session objects went with their session"
    );
    control.write("drop-sessions id=first");
    module.session_state(session).expect("an id that was done is not done again");
    control.write("drop-sessions id=second");
    assert!(module.session_state(session).is_err());
}

#[test]
fn a_token_is_removed_and_put_back() {
    let control = ControlFile::take();
    let token = Token::fresh("pulled");
    let other = Token::fresh("left in");
    let (module, session, slot) = (token.module, token.session, token.slot);
    module.create(session, &Template::aes(&[1; 16]).bool(CKA_TOKEN, true).bytes(CKA_LABEL, "root")).unwrap();
    control.write("remove-token pulled id=out");
    let code = module.random(session, 8).unwrap_err();
    assert!([CKR_DEVICE_REMOVED, CKR_SESSION_HANDLE_INVALID, CKR_TOKEN_NOT_PRESENT].contains(&code), "{}", name(code));
    assert_eq!(module.token_info(slot).map(drop), Err(CKR_TOKEN_NOT_PRESENT));
    assert_eq!(module.open(slot, 0), Err(CKR_TOKEN_NOT_PRESENT));
    assert!(!module.slots(true).contains(&slot));
    assert!(module.slots(false).contains(&slot), "the slot stays");
    module.random(other.session, 8).expect("the other token is there");
    control.write(&format!("insert-token {slot} id=in"));
    await_that("the token is back", || module.slots(true).contains(&slot));
    let session = module.open_rw(slot).unwrap();
    module.login(session, CKU_USER, USER_PIN).unwrap();
    assert_eq!(module.find(session, &Template::new().bytes(CKA_LABEL, "root")).unwrap().len(), 1);
}

#[test]
fn a_token_is_wiped() {
    let control = ControlFile::take();
    let token = Token::fresh("wiped");
    let (module, slot) = (token.module, token.slot);
    module.create(token.session, &Template::aes(&[1; 16]).bool(CKA_TOKEN, true)).unwrap();
    control.write("wipe-token wiped id=wipe");
    assert!(module.session_state(token.session).is_err());
    assert_eq!(module.slot_of("wiped"), None);
    assert_eq!(module.token_info(slot).unwrap().flags & CKF_TOKEN_INITIALIZED, 0);
    module.init_token(slot, "another-so-pin", "reborn").expect("a wiped token takes any officer PIN");
}

#[test]
fn sessions_are_limited() {
    let control = ControlFile::take();
    let token = Token::fresh("few");
    let (module, slot) = (token.module, token.slot);
    control.write("session-limit 3");
    let second = module.open(slot, 0).unwrap();
    let third = module.open_rw(slot).unwrap();
    assert_eq!(module.open(slot, 0), Err(CKR_SESSION_COUNT));
    module.close(second).unwrap();
    module.open(slot, 0).unwrap();
    control.write("");
    module.open(slot, 0).unwrap();
    module.close(third).unwrap();
}

/// A line that makes no sense is no rule, and takes none of the others away.
#[test]
fn nonsense_is_no_rule() {
    let control = ControlFile::take();
    let token = Token::fresh("nonsense");
    let (module, session) = (token.module, token.session);
    control.write("# a comment\nexplode now\nfail C_Nothing CKR_DEVICE_ERROR\nfail C_GenerateRandom CKR_WRONG\nlatency C_GenerateRandom -4\nfail C_SeedRandom CKR_DEVICE_ERROR # why");
    module.random(session, 8).unwrap();
    let mut seed = [0_u8; 4];
    assert_eq!(call!(module, C_SeedRandom, session, seed.as_mut_ptr(), 4), Err(CKR_DEVICE_ERROR));
}
