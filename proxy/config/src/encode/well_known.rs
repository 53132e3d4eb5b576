//! Types that the JSON mapping writes in a form of their own.

use super::{Done, Encoder, Place};
use crate::{
    error::ErrorKind,
    schema::{Message, WellKnown},
    tape::NodeKind,
    time, wire,
};

impl Encoder<'_> {
    /// `Any`: the members of the message that `@type` names.
    pub(super) fn any(&mut self, message: Message, place: Place<'_>) -> Done {
        let tape = self.tape;
        if tape.kind(place.node) != NodeKind::Object {
            return Err(self.mismatch(place, "an object with \"@type\""));
        }
        let mut type_node = None;
        for (key, value) in tape.pairs(place.node) {
            if tape.text(key) == "@type" && type_node.replace(value).is_some() {
                let inner = Place { node: value, ..place };
                return Err(self.fail(inner, ErrorKind::Type, "\"@type\" stands twice"));
            }
        }
        let Some(type_node) = type_node else {
            // Lenient mode: an empty object is an empty Any.
            if tape.pairs(place.node).next().is_none() {
                return Ok(());
            }
            return Err(self.fail(
                place,
                ErrorKind::Type,
                format!("expected \"@type\" in {}", message.name()),
            ));
        };
        let type_node = tape.resolve(type_node);
        let path = place.path.field("@type");
        let type_url = self.string(Place { path: &path, node: type_node }, "a type URL")?;
        let known = match type_url.rfind('/') {
            Some(slash) if slash > 0 => Message::of_type_url(type_url),
            _ => None,
        };
        let Some(inner) = known else {
            let reason = format!("unknown type URL '{}'", super::shorten(type_url));
            return Err(self.fail(Place { path: &path, node: type_node }, ErrorKind::UnknownType, reason));
        };
        if self.typed_struct(inner, place)? {
            return Ok(());
        }
        wire::put_bytes(&mut self.out, 1, type_url.as_bytes());
        let hole = wire::open(&mut self.out, 2, tape.extent(place.node) / 2);
        if inner.well_known() == WellKnown::No {
            self.object(inner, place, Some("@type"))?;
        } else {
            self.any_value(inner, place)?;
        }
        wire::close(&mut self.out, hole);
        Ok(())
    }

    /// An `Any` of a well-known type has its JSON form in `value`.
    fn any_value(&mut self, message: Message, place: Place<'_>) -> Done {
        self.enter(place)?;
        let tape = self.tape;
        for (key, raw) in tape.pairs(place.node) {
            match tape.text(key) {
                "@type" => {}
                "value" => {
                    let path = place.path.field("value");
                    let inner = Place { path: &path, node: tape.resolve(raw) };
                    self.visit(raw, inner)?;
                    self.content(message, inner)?;
                }
                name => {
                    let reason = format!("expected \"value\" beside \"@type\" of {}", message.name());
                    let path = place.path.field(name);
                    return Err(self.fail(Place { path: &path, node: key }, ErrorKind::UnknownField, reason));
                }
            }
        }
        self.depth -= 1;
        Ok(())
    }

    /// Writes a `TypedStruct` as the message it names. Says no if it is none or names nothing known.
    fn typed_struct(&mut self, outer: Message, place: Place<'_>) -> Result<bool, crate::LoadError> {
        if !crate::any::is_typed_struct(outer) {
            return Ok(false);
        }
        let tape = self.tape;
        let member = |names: [&str; 2]| {
            tape.pairs(place.node).filter(|(key, _)| names.contains(&tape.text(*key))).map(|(_, v)| v).last()
        };
        let Some(type_node) = member(["type_url", "typeUrl"]).map(|node| tape.resolve(node)) else {
            return Ok(false);
        };
        let type_url = tape.text(type_node);
        let Some(inner) = crate::any::struct_target(type_url) else { return Ok(false) };
        crate::any::put_type_url(&mut self.out, type_url);
        let hole = wire::open(&mut self.out, 2, tape.extent(place.node) / 2);
        if let Some(raw) = member(["value", "value"]) {
            let path = place.path.field("value");
            let value = Place { path: &path, node: tape.resolve(raw) };
            self.visit(raw, value)?;
            if tape.kind(value.node) != NodeKind::Null {
                self.content(inner, value)?;
            }
        }
        wire::close(&mut self.out, hole);
        Ok(true)
    }

    /// `google.protobuf.Struct`: an object.
    pub(super) fn structure(&mut self, message: Message, place: Place<'_>) -> Done {
        match message.fields().next() {
            Some(fields) => self.map(fields, place),
            None => Ok(()),
        }
    }

    /// `google.protobuf.ListValue`: an array.
    pub(super) fn list(&mut self, message: Message, place: Place<'_>) -> Done {
        if self.tape.kind(place.node) != NodeKind::Array {
            return Err(self.mismatch(place, "a list"));
        }
        match message.fields().next() {
            Some(values) => self.repeated(values, place),
            None => Ok(()),
        }
    }

    /// `google.protobuf.Value`: anything. Its fields have the numbers 1 (null) to 6 (list).
    pub(super) fn value(&mut self, place: Place<'_>) -> Done {
        let tape = self.tape;
        match tape.kind(place.node) {
            NodeKind::Null => self.out.extend_from_slice(&[0x08, 0x00]),
            NodeKind::True => self.out.extend_from_slice(&[0x20, 0x01]),
            NodeKind::False => self.out.extend_from_slice(&[0x20, 0x00]),
            NodeKind::Number => {
                let number: f64 =
                    tape.text(place.node).parse().map_err(|_| self.mismatch(place, "a number"))?;
                wire::put_tag(&mut self.out, 2, 1);
                self.out.extend_from_slice(&number.to_le_bytes());
            }
            NodeKind::String => wire::put_bytes(&mut self.out, 3, tape.text(place.node).as_bytes()),
            NodeKind::Array => return self.within(5 + 1, "google.protobuf.ListValue", place),
            NodeKind::Object | NodeKind::Alias => return self.within(5, "google.protobuf.Struct", place),
        }
        Ok(())
    }

    fn within(&mut self, number: u32, message: &str, place: Place<'_>) -> Done {
        let Some(message) = Message::find(message) else { return Ok(()) };
        let hole = wire::open(&mut self.out, number, self.tape.extent(place.node));
        if number == 5 {
            self.structure(message, place)?;
        } else {
            self.list(message, place)?;
        }
        wire::close(&mut self.out, hole);
        Ok(())
    }

    pub(super) fn duration(&mut self, place: Place<'_>) -> Done {
        const EXPECTED: &str = "a duration as in \"1.5s\"";
        let text = self.string(place, EXPECTED)?;
        let Some((seconds, nanos)) = time::parse_duration(text) else {
            return Err(self.mismatch(place, EXPECTED));
        };
        self.put_time(seconds, nanos);
        Ok(())
    }

    pub(super) fn timestamp(&mut self, place: Place<'_>) -> Done {
        const EXPECTED: &str = "a time as in \"2006-01-02T15:04:05Z\"";
        let text = self.string(place, EXPECTED)?;
        let Some((seconds, nanos)) = time::parse_timestamp(text) else {
            return Err(self.mismatch(place, EXPECTED));
        };
        self.put_time(seconds, nanos);
        Ok(())
    }

    fn put_time(&mut self, seconds: i64, nanos: i32) {
        for (number, value) in [(1, seconds), (2, i64::from(nanos))] {
            if value != 0 {
                wire::put_tag(&mut self.out, number, 0);
                wire::put_varint(&mut self.out, value as u64);
            }
        }
    }

    pub(super) fn field_mask(&mut self, place: Place<'_>) -> Done {
        let text = self.string(place, "a list of paths as in \"a.b,c\"")?;
        for path in text.split(',').filter(|_| !text.is_empty()) {
            let mut snake = String::with_capacity(path.len() + 4);
            for c in path.chars() {
                if c.is_ascii_uppercase() {
                    snake.push('_');
                }
                snake.push(c.to_ascii_lowercase());
            }
            wire::put_bytes(&mut self.out, 1, snake.as_bytes());
        }
        Ok(())
    }
}
