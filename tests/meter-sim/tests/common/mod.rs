//! What the tests share: the keys of the known answers, and a client that drives a connection.
#![allow(dead_code, missing_docs, unreachable_pub, reason = "each test binary uses a part of this module")]

use meter_sim::axdr::Data;
use meter_sim::client::{ClientConfig, ClientSession};
use meter_sim::config::SecuritySetupConfig;
use meter_sim::security::{Ciphering, wrap_key};
use meter_sim::xdlms::{AttributeDescriptor, ExceptionResponse};
use meter_sim::{
    CLASS_REGISTER, Connection, Error, KeyId, Meter, MeterConfig, Obis, SecuritySuite, SymmetricKey, SystemTitle,
};

pub const METER_TITLE: SystemTitle = SystemTitle::new(*b"ABCDEFGH");
pub const CLIENT_TITLE: SystemTitle = SystemTitle::new(*b"KMSHES01");

pub const ENERGY: AttributeDescriptor =
    AttributeDescriptor { class: CLASS_REGISTER, instance: Obis::ACTIVE_ENERGY_IMPORT, attribute: 2 };

pub fn bytes(hex_text: &str) -> Vec<u8> {
    hex::decode(hex_text).unwrap()
}

pub fn key(hex_text: &str) -> SymmetricKey {
    SymmetricKey::new(&bytes(hex_text)).unwrap()
}

/// A key of 16 equal bytes.
pub fn key_of(byte: u8) -> SymmetricKey {
    SymmetricKey::new(&[byte; 16]).unwrap()
}

pub fn guek() -> SymmetricKey {
    key("000102030405060708090A0B0C0D0E0F")
}

pub fn gak() -> SymmetricKey {
    key("D0D1D2D3D4D5D6D7D8D9DADBDCDDDEDF")
}

pub fn kek() -> SymmetricKey {
    key_of(0x31)
}

pub fn ciphering() -> Ciphering {
    Ciphering { encryption: guek(), authentication: gak() }
}

pub fn config() -> MeterConfig {
    MeterConfig::ordinary(METER_TITLE, SecuritySuite::Suite0, SecuritySetupConfig::new(guek(), gak(), kek()))
}

pub fn meter() -> Meter {
    Meter::new(config()).unwrap()
}

pub fn client_config(first_counter: u32) -> ClientConfig {
    ClientConfig {
        client_title: CLIENT_TITLE,
        suite: SecuritySuite::Suite0,
        keys: ciphering(),
        dedicated_key: None,
        counters: first_counter..=u32::MAX,
        general_ciphering: true,
    }
}

/// A client and its connection, without a transport.
pub struct Client {
    pub session: ClientSession,
    pub connection: Connection,
}

impl Client {
    pub fn new(meter: &Meter, config: ClientConfig) -> Self {
        Self { session: ClientSession::new(config).unwrap(), connection: Connection::new(meter.clone(), 1) }
    }

    pub fn associated(meter: &Meter, config: ClientConfig) -> Self {
        let mut client = Self::new(meter, config);
        client.associate().unwrap();
        client
    }

    pub fn exchange(&mut self, apdu: &[u8]) -> Vec<u8> {
        self.connection.exchange(apdu).unwrap()
    }

    pub fn associate(&mut self) -> Result<(), Error> {
        let aarq = self.session.association_request()?;
        let aare = self.exchange(&aarq);
        self.session.process_association_response(&aare)?;
        let request = self.session.hls_request()?;
        let answer = self.exchange(&request);
        self.session.process_hls_response(&answer)
    }

    pub fn get(&mut self, attribute: AttributeDescriptor) -> Result<Data, Error> {
        let request = self.session.get_request(attribute)?;
        let answer = self.exchange(&request);
        self.session.process_get_response(&answer)
    }

    pub fn transfer(&mut self, items: &[(KeyId, &[u8])]) -> Result<(), Error> {
        let request = self.session.key_transfer_request(Obis::SECURITY_SETUP, items)?;
        let answer = self.exchange(&request);
        self.session.process_action_response(&answer).map(|_| ())
    }

    pub fn transfer_key(&mut self, id: KeyId, kek: &SymmetricKey, new: &SymmetricKey) -> Result<(), Error> {
        self.transfer(&[(id, &wrap_key(kek, new).unwrap())])
    }
}

/// The reading that the ordinary meter gives.
pub fn reading() -> Data {
    Data::DoubleLongUnsigned(123_456)
}

pub fn exception(state: u8, service: u8) -> Error {
    Error::Exception(ExceptionResponse::new(state, service))
}

pub fn counter_exception(last: u32) -> Error {
    Error::Exception(ExceptionResponse::invocation_counter(last))
}
