//! Messages of the domain name system (RFC 1035), as far as a filter needs them: the question of a guest, our
//! own question to a name server, its answer, and ours to the guest. Pure, and for bytes from anybody.
//!
//! Only questions for addresses are ever passed on, and nothing of an answer is passed back but addresses: what a
//! name server adds beyond that reaches no guest.

use std::net::Ipv4Addr;

/// The most that is read of any message.
pub(in super::super) const MESSAGE_LIMIT: usize = 4096;
/// How many addresses an answer to a guest has at most: so it fits into a datagram of any resolver.
pub(in super::super) const ADDRESSES_LIMIT: usize = 14;
/// How many records of an answer are looked at.
const RECORDS_LIMIT: u16 = 256;
/// How many aliases are followed.
const ALIASES_LIMIT: usize = 16;

const HEADER: usize = 12;
const A: u16 = 1;
const CNAME: u16 = 5;
const INTERNET: u16 = 1;

/// The outcome that an answer carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Code {
    /// Nothing is wrong; there may be no address all the same.
    Fine,
    /// The question cannot be understood.
    FormatError,
    /// No name server could be asked.
    ServerFailure,
    /// There is no such name.
    NoName,
    /// Questions of this kind are not answered.
    NotImplemented,
    /// The name is not for this sandbox.
    Refused,
}

impl Code {
    const fn number(self) -> u8 {
        match self {
            Self::Fine => 0,
            Self::FormatError => 1,
            Self::ServerFailure => 2,
            Self::NoName => 3,
            Self::NotImplemented => 4,
            Self::Refused => 5,
        }
    }

    const fn of(number: u8) -> Self {
        match number {
            0 => Self::Fine,
            3 => Self::NoName,
            _ => Self::ServerFailure,
        }
    }
}

/// What a guest asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) struct Question {
    id: u16,
    flags: u8,
    /// The question as it was written; an answer repeats it, in the same letters.
    section: Vec<u8>,
    /// The name in lower case; none if it is not that of a host.
    pub(in super::super) name: Option<String>,
    /// Whether it asks for IPv4 addresses.
    pub(in super::super) for_addresses: bool,
}

/// Reads a guest's question. The error is the answer to what is not one; none to what deserves none.
///
/// # Errors
/// The message is not exactly one ordinary question.
pub(in super::super) fn question(message: &[u8]) -> Result<Question, Option<Vec<u8>>> {
    let (Some(id), Some(flags)) = (number(message, 0), message.get(2)) else { return Err(None) };
    if flags & 0x80 != 0 || message.len() < HEADER {
        // To answer an answer would be the beginning of a conversation without end.
        return Err(None);
    }
    let bare = Question { id, flags: *flags, section: Vec::new(), name: None, for_addresses: false };
    if flags & 0x78 != 0 {
        return Err(Some(answer(&bare, Code::NotImplemented, &[], 0)));
    }
    let read = || {
        let (name, end) = plain_name(message)?;
        let (kind, class) = (number(message, end)?, number(message, end + 2)?);
        let section = message.get(HEADER..end + 4)?.to_vec();
        let for_addresses = kind == A && class == INTERNET;
        Some(Question { id, flags: *flags, section, name, for_addresses })
    };
    let one = number(message, 4) == Some(1) && message.len() <= MESSAGE_LIMIT;
    one.then(read).flatten().ok_or_else(|| Some(answer(&bare, Code::FormatError, &[], 0)))
}

/// The name at the beginning of a question, without any compression. The inner one is none where it is no host's.
fn plain_name(message: &[u8]) -> Option<(Option<String>, usize)> {
    let mut at = HEADER;
    loop {
        let length = usize::from(*message.get(at)?);
        if length == 0 {
            break;
        }
        if length > 63 {
            return None;
        }
        at += 1 + length;
    }
    if at + 1 - HEADER > 255 {
        return None;
    }
    name_at(message, HEADER)
}

/// The answer to a question. What is more than [`ADDRESSES_LIMIT`] is left out.
#[must_use]
pub(in super::super) fn answer(
    question: &Question,
    code: Code,
    addresses: &[Ipv4Addr],
    time_to_live: u32,
) -> Vec<u8> {
    let addresses = &addresses[..addresses.len().min(ADDRESSES_LIMIT)];
    let mut message = Vec::with_capacity(HEADER + question.section.len() + 16 * addresses.len());
    message.extend(question.id.to_be_bytes());
    // An answer, with the kind and the wish for recursion of the question; recursion is to be had.
    message.push(0x80 | (question.flags & 0x79));
    message.push(0x80 | code.number());
    message.extend(u16::from(!question.section.is_empty()).to_be_bytes());
    #[expect(clippy::cast_possible_truncation, reason = "there are at most fourteen")]
    message.extend((addresses.len() as u16).to_be_bytes());
    message.extend([0; 4]);
    message.extend(&question.section);
    for address in addresses {
        // The name is the one at the beginning of the question.
        message.extend([0xc0, 0x0c]);
        message.extend(A.to_be_bytes());
        message.extend(INTERNET.to_be_bytes());
        message.extend(time_to_live.to_be_bytes());
        message.extend([0, 4]);
        message.extend(address.octets());
    }
    message
}

/// A question of ours for the addresses of a name. None for what is too long to be a name.
#[must_use]
pub(in super::super) fn ask(id: u16, name: &str) -> Option<Vec<u8>> {
    let mut message = Vec::with_capacity(HEADER + name.len() + 6);
    message.extend(id.to_be_bytes());
    message.extend([0x01, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.strip_suffix('.').unwrap_or(name).split('.') {
        let length = u8::try_from(label.len()).ok().filter(|length| (1..=63).contains(length))?;
        message.push(length);
        message.extend(label.as_bytes());
    }
    message.push(0);
    if message.len() > HEADER + 255 {
        return None;
    }
    message.extend(A.to_be_bytes());
    message.extend(INTERNET.to_be_bytes());
    Some(message)
}

/// A name of which each letter is a capital or not, as one bit says: its server has to repeat what nobody else knows.
#[must_use]
pub(in super::super) fn in_letters(name: &str, bits: &[u8; 32]) -> String {
    let capital = |at: usize| bits.get(at / 8).is_some_and(|byte| byte >> (at % 8) & 1 == 1);
    let letter = |(at, letter): (usize, char)| match capital(at) {
        true => letter.to_ascii_uppercase(),
        false => letter.to_ascii_lowercase(),
    };
    name.chars().enumerate().map(letter).collect()
}

/// A message as it is sent over TCP: its length comes first.
#[must_use]
pub(in super::super) fn with_length(message: &[u8]) -> Vec<u8> {
    let length = u16::try_from(message.len()).unwrap_or(u16::MAX);
    [&length.to_be_bytes(), message].concat()
}

/// What a name server says of a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) struct Answer {
    /// How it went.
    pub(in super::super) code: Code,
    /// There is more than fits into a datagram.
    pub(in super::super) truncated: bool,
    /// It repeats the question in the letters in which that was asked.
    pub(in super::super) is_in_letters: bool,
    /// The aliases on the way to the addresses, in lower case.
    pub(in super::super) aliases: Vec<String>,
    /// The addresses, none twice.
    pub(in super::super) addresses: Vec<Ipv4Addr>,
    /// For how many seconds all of that holds.
    pub(in super::super) time_to_live: u32,
}

/// Reads the answer to our question; none if it is not the answer to that one.
#[must_use]
pub(in super::super) fn read_answer(message: &[u8], id: u16, name: &str) -> Option<Answer> {
    let asked_for = ask(id, name)?;
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    let flags = number(message, 2)?;
    if number(message, 0)? != id || flags & 0x8000 == 0 || number(message, 4)? != 1 {
        return None;
    }
    let (asked, mut at) = plain_name(message)?;
    if asked.as_deref() != Some(&*name) || (number(message, at)?, number(message, at + 2)?) != (A, INTERNET) {
        return None;
    }
    at += 4;
    let is_in_letters = message.get(HEADER..at) == asked_for.get(HEADER..);
    let mut records = Vec::new();
    for _ in 0..number(message, 6)?.min(RECORDS_LIMIT) {
        let Some((record, end)) = record(message, at) else { break };
        records.push(record);
        at = end;
    }
    let code = Code::of((flags & 0xf) as u8);
    let mut answer = Answer {
        code,
        truncated: flags & 0x0200 != 0,
        is_in_letters,
        aliases: Vec::new(),
        addresses: Vec::new(),
        time_to_live: u32::MAX,
    };
    let mut owner = name;
    while answer.aliases.len() < ALIASES_LIMIT {
        let of_owner = records.iter().filter(|record| record.owner.as_deref() == Some(&*owner));
        let mut next = None;
        for record in of_owner {
            match &record.data {
                Data::Address(address) if !answer.addresses.contains(address) => {
                    answer.addresses.push(*address)
                }
                Data::Alias(alias) => next = Some(alias.clone()),
                Data::Address(_) | Data::Other => continue,
            }
            // A first bit that is set would be a negative number: RFC 2181 makes it zero.
            let seconds = if record.time_to_live > i32::MAX.unsigned_abs() { 0 } else { record.time_to_live };
            answer.time_to_live = answer.time_to_live.min(seconds);
        }
        match next {
            Some(alias) if answer.addresses.is_empty() && !answer.aliases.contains(&alias) => {
                answer.aliases.push(alias.clone());
                owner = alias;
            }
            _ => break,
        }
    }
    if answer.time_to_live == u32::MAX {
        answer.time_to_live = 0;
    }
    Some(answer)
}

struct Record {
    owner: Option<String>,
    time_to_live: u32,
    data: Data,
}

enum Data {
    Address(Ipv4Addr),
    Alias(String),
    Other,
}

fn record(message: &[u8], at: usize) -> Option<(Record, usize)> {
    let (owner, at) = name_at(message, at)?;
    let (kind, class) = (number(message, at)?, number(message, at + 2)?);
    let time_to_live = u32::from(number(message, at + 4)?) << 16 | u32::from(number(message, at + 6)?);
    let length = usize::from(number(message, at + 8)?);
    let data = message.get(at + 10..at + 10 + length)?;
    let data = match (kind, class) {
        (A, INTERNET) => <[u8; 4]>::try_from(data).map_or(Data::Other, |octets| Data::Address(octets.into())),
        (CNAME, INTERNET) => {
            name_at(message, at + 10).and_then(|(name, _)| name).map_or(Data::Other, Data::Alias)
        }
        _ => Data::Other,
    };
    Some((Record { owner, time_to_live, data }, at + 10 + length))
}

/// A name and what comes after it. A pointer leads only to what is before it, so that none leads in a circle.
/// The inner one is none where the name is not one of a host.
fn name_at(message: &[u8], from: usize) -> Option<(Option<String>, usize)> {
    let (mut at, mut end, mut barrier) = (from, None, from);
    let (mut name, mut is_host, mut length) = (String::new(), true, 0);
    loop {
        let first = *message.get(at)?;
        if first & 0xc0 == 0xc0 {
            let pointed = usize::from(number(message, at)? & 0x3fff);
            end.get_or_insert(at + 2);
            if pointed >= barrier {
                return None;
            }
            (at, barrier) = (pointed, pointed);
            continue;
        }
        if first > 63 {
            return None;
        }
        if first == 0 {
            break;
        }
        let label = message.get(at + 1..at + 1 + usize::from(first))?;
        length += 1 + label.len();
        if length > 254 {
            return None;
        }
        is_host &= label.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
        if !name.is_empty() {
            name.push('.');
        }
        name.extend(label.iter().map(|byte| char::from(byte.to_ascii_lowercase())));
        at += 1 + label.len();
    }
    let is_host = is_host && !name.is_empty();
    Some((is_host.then_some(name), end.unwrap_or(at + 1)))
}

fn number(message: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(message.get(at..at + 2)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    /// What a name server sends: these records after the question.
    fn reply(id: u16, name: &str, flags: [u8; 2], records: &[(&str, u16, u32, Vec<u8>)]) -> Vec<u8> {
        let mut message = ask(id, name).unwrap();
        message[2..4].copy_from_slice(&flags);
        message[7] = u8::try_from(records.len()).unwrap();
        for (owner, kind, seconds, data) in records {
            if *owner == name {
                message.extend([0xc0, 0x0c]);
            } else {
                message.extend(wire(owner));
            }
            message.extend(kind.to_be_bytes());
            message.extend([0, 1]);
            message.extend(seconds.to_be_bytes());
            message.extend(u16::try_from(data.len()).unwrap().to_be_bytes());
            message.extend(data);
        }
        message
    }

    fn wire(name: &str) -> Vec<u8> {
        let asked = ask(0, name).unwrap();
        asked[HEADER..asked.len() - 4].to_vec()
    }

    #[test]
    fn a_question_and_its_answer() {
        let message = ask(7, "WWW.Example.com").unwrap();
        let question = question(&message).unwrap();
        assert_eq!((question.name.as_deref(), question.for_addresses), (Some("www.example.com"), true));
        let addresses = [Ipv4Addr::new(1, 2, 3, 4); 20];
        let answered = answer(&question, Code::Fine, &addresses, 9);
        assert!(answered.len() <= 512);
        assert_eq!(answered[HEADER..message.len()], message[HEADER..], "the question in its own letters");
        let read = read_answer(&answered, 7, "www.example.com.").unwrap();
        assert_eq!((read.code, read.addresses, read.time_to_live), (Code::Fine, vec![addresses[0]], 9));
        assert_eq!(read_answer(&answered, 8, "www.example.com"), None);
        assert_eq!(read_answer(&answered, 7, "example.com"), None);
        let refused = answer(&question, Code::Refused, &[], 0);
        assert_eq!(refused[3] & 0xf, 5);
    }

    #[test]
    fn what_is_not_a_question() {
        let good = ask(7, "a.example").unwrap();
        assert_eq!(question(&good[..9]), Err(None));
        let changed = |at: usize, byte: u8| {
            let mut message = good.clone();
            message[at] = byte;
            question(&message)
        };
        assert_eq!(changed(2, 0x81), Err(None), "an answer");
        assert_eq!(changed(2, 0x10).unwrap_err().unwrap()[3] & 0xf, 4);
        assert_eq!(changed(5, 2).unwrap_err().unwrap()[3] & 0xf, 1);
        assert_eq!(changed(12, 0xc0).unwrap_err().unwrap()[3] & 0xf, 1, "a pointer in a question");
        assert_eq!(changed(13, b'.').unwrap().name, None, "not a host's");
        assert!(!changed(good.len() - 3, 28).unwrap().for_addresses);
    }

    #[test]
    fn aliases_are_followed_and_nothing_else_is_believed() {
        let address = |last| vec![203, 0, 113, last];
        let message = reply(
            1,
            "a.example",
            [0x81, 0x80],
            &[
                ("a.example", CNAME, 300, wire("B.example")),
                ("b.example", CNAME, 60, wire("c.example")),
                ("other.example", A, 1, address(66)),
                ("c.example", A, 90, address(1)),
                ("c.example", A, 90, address(2)),
                ("c.example", 28, 1, vec![0; 16]),
            ],
        );
        let answer = read_answer(&message, 1, "a.example").unwrap();
        assert_eq!(answer.aliases, ["b.example", "c.example"]);
        assert_eq!(answer.addresses, [Ipv4Addr::new(203, 0, 113, 1), Ipv4Addr::new(203, 0, 113, 2)]);
        assert_eq!(answer.time_to_live, 60);
        let circle = reply(
            1,
            "a.example",
            [0x83, 0x83],
            &[("a.example", CNAME, 1, wire("b.example")), ("b.example", CNAME, 1, wire("a.example"))],
        );
        let answer = read_answer(&circle, 1, "a.example").unwrap();
        assert!(answer.truncated && answer.code == Code::NoName && answer.addresses.is_empty());
    }

    #[test]
    fn a_pointer_never_leads_forward() {
        for pointer in [[0xc0, 0x0c], [0xc0, 0xff]] {
            let mut message = vec![0; HEADER];
            message.extend(pointer);
            assert_eq!(name_at(&message, HEADER), None);
        }
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_strange(message in vec(any::<u8>(), 0..600), at in 0_usize..700) {
            let _ = name_at(&message, at);
            let _ = read_answer(&message, 1, "a.example");
            if let Ok(question) = question(&message) {
                prop_assert!(answer(&question, Code::Fine, &[Ipv4Addr::LOCALHOST; 20], 1).len() <= 512);
            }
        }

        #[test]
        fn no_change_of_an_answer_is_too_strange(changes in vec((any::<prop::sample::Index>(), any::<u8>()), 0..6)) {
            let records = [
                ("a.example", CNAME, 300, wire("b.example")),
                ("b.example", A, 60, vec![203, 0, 113, 9]),
            ];
            let mut message = reply(1, "a.example", [0x81, 0x80], &records);
            for (index, byte) in changes {
                let at = index.index(message.len());
                message[at] = byte;
            }
            let _ = read_answer(&message, 1, "a.example");
            let _ = question(&message);
        }

        #[test]
        fn whatever_its_letters_a_question_is_for_the_same_name(name in "[a-zA-Z0-9_]{1,20}(\\.[a-z0-9-]{1,30}){0,6}", bits: [u8; 32], other: [u8; 32]) {
            let (one, other) = (in_letters(&name, &bits), in_letters(&name, &other));
            prop_assert!(one.eq_ignore_ascii_case(&name));
            let asked = question(&ask(9, &one).unwrap()).unwrap();
            prop_assert_eq!(asked.name.as_deref(), Some(&*name.to_ascii_lowercase()));
            let message = answer(&asked, Code::Fine, &[Ipv4Addr::LOCALHOST], 1);
            prop_assert!(read_answer(&message, 9, &one).unwrap().is_in_letters);
            let seen = read_answer(&message, 9, &other).unwrap();
            prop_assert_eq!(seen.is_in_letters, one == other);
            prop_assert_eq!(seen.addresses, vec![Ipv4Addr::LOCALHOST]);
        }

        #[test]
        fn a_name_is_read_as_it_was_written(name in "[a-z0-9_]{1,20}(\\.[a-z0-9-]{1,30}){0,6}", id: u16) {
            let question = question(&ask(id, &name).unwrap()).unwrap();
            prop_assert_eq!(question.name.as_deref(), Some(name.as_str()));
        }
    }
}
