-- A database of schema version 5, as its servers left it: rows in every table, and the digests of the
-- steps that made the tables. kms-server/store/tests/schemas.rs reads it. Never change it: such
-- databases exist. x'…' stands for octets on both databases.

CREATE TABLE schema_version (version BIGINT PRIMARY KEY, name TEXT NOT NULL, sha256 TEXT NOT NULL, applied_ms BIGINT NOT NULL);
INSERT INTO schema_version (version, name, sha256, applied_ms) VALUES (1, 'initial', '767aea85f5a597901aeac083067d760cecb9e39223b979d5765487634c8a8b34', 1000); -- sqlite only
INSERT INTO schema_version (version, name, sha256, applied_ms) VALUES (1, 'initial', '495473e3c6842380daeee1cdd39dab31a851087a59f00f008043b54ce2438c9d', 1000); -- postgres only
INSERT INTO schema_version (version, name, sha256, applied_ms) VALUES (2, 'campaigns', 'fdcadc094cf2b61f9bee1f380e59a958f662dcc06bdf110c6429f1e0e64c0ac0', 2000); -- sqlite only
INSERT INTO schema_version (version, name, sha256, applied_ms) VALUES (2, 'campaigns', 'cb896d154bc7dcf646f5adc81b7b1024fffb6f234ee6a462f8ee4d8d6a25c80a', 2000); -- postgres only
INSERT INTO schema_version (version, name, sha256, applied_ms) VALUES (3, 'group members', 'abe6d742e9423a5fd7536b993d4e7dc2657f19db93e0439cc835e92eb836c708', 3000); -- sqlite only
INSERT INTO schema_version (version, name, sha256, applied_ms) VALUES (3, 'group members', 'e486d6cbdda77f8072bb3589b3edb3974e1faa25d3cd1b42bb158f9cd330c230', 3000); -- postgres only
INSERT INTO schema_version (version, name, sha256, applied_ms) VALUES (4, 'work orders', '1f894997f82d927664df427615c105c8fa93d158f8a2c8bdf0beadb28751b1cc', 4000); -- sqlite only
INSERT INTO schema_version (version, name, sha256, applied_ms) VALUES (4, 'work orders', 'a3e61063b1aff5d569797d0ede6523dcd58700b9bc96f19c73c0e755d5231267', 4000); -- postgres only
INSERT INTO schema_version (version, name, sha256, applied_ms) VALUES (5, 'exposures', '477be61b2b028a9bd01ff0b94ad02bb88e7df23ae37c2dcf5387bd5807be07f3', 4000); -- sqlite only
INSERT INTO schema_version (version, name, sha256, applied_ms) VALUES (5, 'exposures', 'bc50660ef871c6cb304e0c0a749610087e418e7eb430792850d7ac0faaf86a06', 4000); -- postgres only

INSERT INTO term (kind, text) VALUES (1, 'KAM');
INSERT INTO term (kind, text) VALUES (2, 'generic-suite0');
INSERT INTO term (kind, text) VALUES (3, 'urn:meterkms:north:head-end:hes');
INSERT INTO term (kind, text) VALUES (4, 'KAM-2026-0001');
INSERT INTO term (kind, text) VALUES (5, 'urn:meterkms:north:head-end:hes');
INSERT INTO term (kind, text) VALUES (6, 'read');
INSERT INTO meter (title, generation, seal, body, vendor, profile, status, head_end, batch) VALUES (5422700088726126593, 2, x'020202020202020202020202020202020202', x'6d657465722031', 1, 2, 1, 3, 4);
INSERT INTO meter (title, generation, seal, body, vendor, profile, status, head_end, batch) VALUES (5422700088726126594, 1, x'010101010101010101010101010101010101', x'6d657465722032', 1, 2, 1, 0, 0);
INSERT INTO sealed (kind, id, generation, seal, body) VALUES (2, x'00ff02', 1, x'010101010101010101010101010101010101', x'67726f7570');
INSERT INTO sealed (kind, id, generation, seal, body) VALUES (3, x'00ff03', 1, x'010101010101010101010101010101010101', x'6465766963652074797065');
INSERT INTO sealed (kind, id, generation, seal, body) VALUES (4, x'00ff04', 1, x'010101010101010101010101010101010101', x'7072696e636970616c');
INSERT INTO sealed (kind, id, generation, seal, body) VALUES (5, x'00ff05', 1, x'010101010101010101010101010101010101', x'636f756e74657220646f6d61696e');
INSERT INTO sealed (kind, id, generation, seal, body) VALUES (6, x'00ff06', 1, x'010101010101010101010101010101010101', x'69736c616e64');
INSERT INTO sealed (kind, id, generation, seal, body) VALUES (7, x'00ff07', 1, x'010101010101010101010101010101010101', x'71756f746120757365');
INSERT INTO sealed (kind, id, generation, seal, body) VALUES (8, x'00ff08', 1, x'010101010101010101010101010101010101', x'63616d706169676e');
INSERT INTO sealed (kind, id, generation, seal, body) VALUES (9, x'00ff09', 1, x'010101010101010101010101010101010101', x'726f6f7420726f746174696f6e');
INSERT INTO sealed (kind, id, generation, seal, body) VALUES (12, x'00ff0c', 1, x'010101010101010101010101010101010101', x'70726f706f73616c');
INSERT INTO sealed (kind, id, generation, seal, body) VALUES (14, x'00ff0e', 1, x'010101010101010101010101010101010101', x'776f726b206f72646572');
INSERT INTO server (writer, name, started_ms, heartbeat_ms) VALUES (x'07070707070707070707070707070707', 'kms-1', 1000, 2000);
INSERT INTO audit (writer, sequence, time_ms, kind, chain, record) VALUES (1, 0, 1000, 7, x'0000000000000000000000000000000000000000000000000000000000000000', x'7265636f72642030');
INSERT INTO audit (writer, sequence, time_ms, kind, chain, record) VALUES (1, 1, 1001, 7, x'0101010101010101010101010101010101010101010101010101010101010101', x'7265636f72642031');
INSERT INTO request (request, principal, chunk, digest, outcome, expires_ms) VALUES (x'02020202020202020202020202020202', 5, 3, x'0505050505050505050505050505050505050505050505050505050505050505', x'6f7574636f6d65', 99);
INSERT INTO key_grant (id, principal, purpose, issued_ms, not_after_ms, writer, sequence, meters, revoked_ms) VALUES (x'01010101010101010101010101010101', 5, 6, 10, 110, 1, 0, 1000, 77);
INSERT INTO key_grant (id, principal, purpose, issued_ms, not_after_ms, writer, sequence, meters, revoked_ms) VALUES (x'02020202020202020202020202020202', 5, 6, 20, 120, 1, 1, 1, NULL);
INSERT INTO fingerprint (prefix, owner_kind, owner, setup, key_type, version) VALUES (-1, 0, 5422700088726126593, 258, 2, 1);
INSERT INTO shipment (upload, generation, sha256, size, batch, principal, state, received, next_line, imported, refused, created_ms, updated_ms, progress) VALUES (x'03030303030303030303030303030303', 1, x'0808080808080808080808080808080808080808080808080808080808080808', 10, '', 'urn:meterkms:north:head-end:vendor', 1, 5, 0, 0, 0, 1, 2, x'09');
INSERT INTO shipment_chunk (upload, position, octets) VALUES (x'03030303030303030303030303030303', 0, x'3031323334');
INSERT INTO shipment_refusal (upload, line, field, reason) VALUES (x'03030303030303030303030303030303', 7, 'serial', 'it is empty');
INSERT INTO pin_failure (token, user_type, phc, time_ms) VALUES ('north', 1, '$argon2id$', 5);
INSERT INTO campaign_chunk (campaign, number, titles) VALUES (x'06060606060606060606060606060606', 0, x'4b414d0000000001');
INSERT INTO task (campaign, meter, generation, wave, vendor, head_end, setup, key_type, from_version, state, probe, attempts, due_ms, fence, leased_ms, ended_ms, reason, mark) VALUES (x'06060606060606060606060606060606', 5422700088726126593, 1, 1, 1, 3, 0, 2, 1, 1, 1, 2, 1000, 3, 900, 0, 'unreachable', x'04040404040404040404040404040404');
INSERT INTO group_member (group_number, meter) VALUES (4, 5422700088726126593);
INSERT INTO work_order (id, maker, technician, state, from_ms, until_ms) VALUES (x'574f2d31', 5, 'ida berg', 0, 1000, 9000000000000);
INSERT INTO exposure (party_kind, party, owner_kind, owner, slots, open, newest_ms) VALUES (2, 5, 0, 5422700088726126593, 2, 1, 77);
INSERT INTO exposure_index (number, complete) VALUES (1, 1) ON CONFLICT (number) DO UPDATE SET complete = 1;
