//! An event of a process as the message of a method.
//!
//! Output is most of what the agent ever sends, and as JSON it goes through base64. So a piece of output is written
//! into its message at once, instead of through the generated types, which would copy it three times on the way.
//! The bytes are the same, which the tests hold; everything else is left to the generated types.

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use connectrpc::{CodecFormat, ConnectError, Encodable, EncodedBody};
use wrenn_proto::process::{
    ConnectResponse, ProcessEvent, StartResponse,
    process_event::{EndEvent, KeepAlive, StartEvent},
};

use super::running::{Origin, Output};

/// What happened, for one client.
#[derive(Debug)]
pub(crate) enum Event {
    Output(Output),
    Other(ProcessEvent),
}

impl From<StartEvent> for Event {
    fn from(event: StartEvent) -> Self {
        Self::Other(ProcessEvent { event: event.into(), ..ProcessEvent::default() })
    }
}

impl From<KeepAlive> for Event {
    fn from(event: KeepAlive) -> Self {
        Self::Other(ProcessEvent { event: event.into(), ..ProcessEvent::default() })
    }
}

impl From<EndEvent> for Event {
    fn from(event: EndEvent) -> Self {
        Self::Other(ProcessEvent { event: event.into(), ..ProcessEvent::default() })
    }
}

/// The two methods whose messages hold nothing but an event, in the same field.
macro_rules! encodable {
    ($message:ident) => {
        impl Encodable<$message> for Event {
            fn encode(&self, codec: CodecFormat) -> Result<Bytes, ConnectError> {
                self.encode_as(codec, wrap::$message).map(EncodedBody::into_contiguous)
            }

            fn encode_segments(&self, codec: CodecFormat) -> Result<EncodedBody, ConnectError> {
                self.encode_as(codec, wrap::$message)
            }
        }
    };
}

encodable!(StartResponse);
encodable!(ConnectResponse);

#[allow(non_snake_case, reason = "each is named after what it makes")]
mod wrap {
    use super::{ConnectResponse, ProcessEvent, StartResponse};

    pub(super) fn StartResponse(event: ProcessEvent) -> StartResponse {
        StartResponse { event: event.into(), ..Default::default() }
    }

    pub(super) fn ConnectResponse(event: ProcessEvent) -> ConnectResponse {
        ConnectResponse { event: event.into(), ..Default::default() }
    }
}

impl Event {
    fn encode_as<M: Encodable<M>>(
        &self,
        codec: CodecFormat,
        wrap: impl Fn(ProcessEvent) -> M,
    ) -> Result<EncodedBody, ConnectError> {
        match (self, codec) {
            (Self::Output(output), CodecFormat::Json) => Ok(json(output).into()),
            (Self::Output(output), CodecFormat::Proto) => Ok(binary(output)),
            (Self::Other(event), _) => wrap(event.clone()).encode_segments(codec),
            (Self::Output(_), _) => Err(ConnectError::unimplemented("unknown encoding")),
        }
    }
}

fn json(output: &Output) -> Bytes {
    let name = match output.origin {
        Origin::Stdout => "stdout",
        Origin::Stderr => "stderr",
        Origin::Terminal => "pty",
    };
    let encoded = output.bytes.len().div_ceil(3) * 4;
    let mut text = Vec::with_capacity(encoded + 40);
    for part in ["{\"event\":{\"data\":{\"", name, "\":\""] {
        text.extend_from_slice(part.as_bytes());
    }
    let start = text.len();
    text.resize(start + encoded, 0);
    // It fits exactly: the length is computed as the encoder does.
    let _ = STANDARD.encode_slice(&output.bytes, &mut text[start..]);
    text.extend_from_slice(b"\"}}}");
    text.into()
}

/// Three nested fields: the event of the message, the data of the event, the bytes of the data.
fn binary(output: &Output) -> EncodedBody {
    const EVENT: u8 = field(1);
    const DATA: u8 = field(2);
    let piece = match output.origin {
        Origin::Stdout => field(1),
        Origin::Stderr => field(2),
        Origin::Terminal => field(3),
    };
    let length = output.bytes.len();
    let data = 1 + varint_length(length) + length;
    let event = 1 + varint_length(data) + data;
    let mut head = Vec::with_capacity(16);
    for (field, length) in [(EVENT, event), (DATA, data), (piece, length)] {
        head.push(field);
        push_varint(&mut head, length);
    }
    EncodedBody::from_segments(vec![head.into(), output.bytes.clone()])
}

/// The tag of a field whose value has a length.
const fn field(number: u8) -> u8 {
    number << 3 | 2
}

fn varint_length(value: usize) -> usize {
    let bits = usize::BITS - value.leading_zeros();
    usize::try_from(bits.div_ceil(7)).unwrap_or(0).max(1)
}

fn push_varint(bytes: &mut Vec<u8>, mut value: usize) {
    while value > 0x7f {
        bytes.push(u8::try_from(value & 0x7f).unwrap_or(0) | 0x80);
        value >>= 7;
    }
    bytes.push(u8::try_from(value).unwrap_or(0));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use wrenn_proto::process::{
        __buffa::oneof::process_event::data_event::Output as Wire, process_event::DataEvent,
    };

    use super::*;

    /// What the generated types make of a piece of output.
    fn generated(output: &Output) -> ProcessEvent {
        let bytes = output.bytes.to_vec();
        let output = match output.origin {
            Origin::Stdout => Wire::Stdout(bytes),
            Origin::Stderr => Wire::Stderr(bytes),
            Origin::Terminal => Wire::Pty(bytes),
        };
        let data = DataEvent { output: Some(output), ..DataEvent::default() };
        ProcessEvent { event: data.into(), ..ProcessEvent::default() }
    }

    fn check(origin: Origin, bytes: Vec<u8>) {
        let output = Output { origin, bytes: bytes.into() };
        let start = wrap::StartResponse(generated(&output));
        let connect = wrap::ConnectResponse(generated(&output));
        let event = Event::Output(output);
        for codec in [CodecFormat::Json, CodecFormat::Proto] {
            let encoded = Encodable::<StartResponse>::encode(&event, codec).unwrap();
            assert_eq!(encoded, Encodable::<StartResponse>::encode(&start, codec).unwrap());
            let encoded = Encodable::<ConnectResponse>::encode_segments(&event, codec).unwrap();
            let expected = Encodable::<ConnectResponse>::encode(&connect, codec).unwrap();
            assert_eq!(encoded.into_contiguous(), expected);
        }
    }

    #[test]
    fn lengths_at_which_the_framing_changes() {
        for length in [1, 2, 3, 120, 124, 125, 126, 127, 128, 16_370, 16_383, 16_384, 32_768] {
            check(Origin::Stdout, vec![0xa5; length]);
        }
    }

    proptest! {
        #[test]
        fn output_is_encoded_as_the_generated_types_do(
            bytes in proptest::collection::vec(any::<u8>(), 1..600), origin in 0..3_u8,
        ) {
            check([Origin::Stdout, Origin::Stderr, Origin::Terminal][usize::from(origin)], bytes);
        }
    }
}
