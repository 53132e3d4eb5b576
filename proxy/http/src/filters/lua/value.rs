//! Metadata as Lua values, and back.

use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{ListValue, Struct, Value as Proto};
use mlua::{Lua, Table, Value};

use super::object::{Fail, type_name};

/// A value as Lua sees it.
pub(super) fn to_lua(lua: &Lua, value: &Proto) -> mlua::Result<Value> {
    Ok(match &value.kind {
        None | Some(Kind::NullValue(_)) => Value::Nil,
        Some(Kind::NumberValue(number)) => Value::Number(*number),
        Some(Kind::BoolValue(value)) => Value::Boolean(*value),
        Some(Kind::StringValue(text)) => Value::String(lua.create_string(text)?),
        Some(Kind::StructValue(fields)) => Value::Table(table(lua, fields)?),
        Some(Kind::ListValue(list)) => {
            let table = lua.create_table_with_capacity(list.values.len(), 0)?;
            for (index, value) in list.values.iter().enumerate() {
                table.raw_set(index + 1, to_lua(lua, value)?)?;
            }
            Value::Table(table)
        }
    })
}

/// A struct as a table.
pub(super) fn table(lua: &Lua, fields: &Struct) -> mlua::Result<Table> {
    let table = lua.create_table_with_capacity(0, fields.fields.len())?;
    for (key, value) in &fields.fields {
        table.raw_set(key.as_str(), to_lua(lua, value)?)?;
    }
    Ok(table)
}

/// How deep tables may lie in each other; Envoy has no bound and dies of a table that holds itself.
const DEPTH: usize = 100;

/// A Lua value as metadata.
pub(super) fn from_lua(value: &Value) -> Result<Proto, Fail> {
    convert(value, DEPTH)
}

fn convert(value: &Value, depth: usize) -> Result<Proto, Fail> {
    let kind = match value {
        Value::Nil => Kind::NullValue(0),
        Value::Integer(number) => Kind::NumberValue(*number as f64),
        Value::Number(number) => Kind::NumberValue(*number),
        Value::Boolean(value) => Kind::BoolValue(*value),
        Value::String(text) => Kind::StringValue(
            String::from_utf8_lossy(super::object::up_to_nul(&text.as_bytes())).into_owned(),
        ),
        Value::Table(_) if depth == 0 => return Err(Fail::from("table in dynamicMetadata is too deep")),
        Value::Table(table) => match list_length(table)? {
            Some(length) => Kind::ListValue(list(table, length, depth - 1)?),
            None => Kind::StructValue(fields(table, depth - 1)?),
        },
        other => return Err(Fail(format!("unexpected type '{}' in dynamicMetadata", type_name(other)))),
    };
    Ok(Proto { kind: Some(kind) })
}

/// The greatest index, where all keys are indices and there are some.
fn list_length(table: &Table) -> Result<Option<usize>, Fail> {
    let mut greatest = 0;
    for pair in table.clone().pairs::<Value, Value>() {
        let (key, _) = pair.map_err(super::object::internal)?;
        let index = match key {
            Value::Integer(index) => index as f64,
            Value::Number(index) => index,
            _ => return Ok(None),
        };
        if index.fract() != 0.0 || index < 1.0 {
            return Ok(None);
        }
        greatest = greatest.max(index as usize);
    }
    Ok(Some(greatest).filter(|length| *length > 0))
}

/// How long a list may be: Envoy fills gaps between indices, however wide.
const LIST: usize = 1 << 20;

fn list(table: &Table, length: usize, depth: usize) -> Result<ListValue, Fail> {
    if length > LIST {
        return Err(Fail::from("list in dynamicMetadata is too long"));
    }
    let value = |index| table.raw_get::<Value>(index).map_err(super::object::internal);
    let values = (1..=length).map(|index| convert(&value(index)?, depth));
    Ok(ListValue { values: values.collect::<Result<_, Fail>>()? })
}

fn fields(table: &Table, depth: usize) -> Result<Struct, Fail> {
    let mut fields = Struct::default();
    for pair in table.clone().pairs::<Value, Value>() {
        let (key, value) = pair.map_err(super::object::internal)?;
        let Value::String(key) = &key else {
            return Err(Fail(format!(
                "unexpected type {} in table key (only string keys are supported)",
                type_name(&key)
            )));
        };
        let key = String::from_utf8_lossy(super::object::up_to_nul(&key.as_bytes())).into_owned();
        fields.fields.insert(key, convert(&value, depth)?);
    }
    Ok(fields)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn convert(code: &str) -> Result<serde_json::Value, String> {
        let lua = Lua::new();
        let value = lua.load(code).eval::<Value>().unwrap();
        let value = from_lua(&value).map_err(|Fail(text)| text)?;
        let again = from_lua(&to_lua(&lua, &value).unwrap()).map_err(|Fail(text)| text)?;
        assert_eq!(again, value, "the way back");
        Ok(json(&value))
    }

    fn json(value: &Proto) -> serde_json::Value {
        match value.kind.clone().unwrap() {
            Kind::NullValue(_) => serde_json::Value::Null,
            Kind::NumberValue(number) => number.into(),
            Kind::StringValue(text) => text.into(),
            Kind::BoolValue(value) => value.into(),
            Kind::ListValue(list) => list.values.iter().map(json).collect(),
            Kind::StructValue(fields) => fields.fields.iter().map(|(k, v)| (k.clone(), json(v))).collect(),
        }
    }

    #[test]
    fn tables_are_lists_or_structs() {
        assert_eq!(
            convert("return {1, 'two', {three = true}}"),
            Ok(serde_json::json!([1.0, "two", {"three": true}]))
        );
        assert_eq!(convert("return {}"), Ok(serde_json::json!({})));
        assert_eq!(convert("return 'a\\0b'"), Ok(serde_json::json!("a")));
        let mixed = "unexpected type number in table key (only string keys are supported)";
        assert_eq!(convert("return {1, x = 2}"), Err(mixed.to_owned()));
        assert_eq!(convert("return print"), Err("unexpected type 'function' in dynamicMetadata".to_owned()));
    }

    #[test]
    fn what_would_take_too_much_is_refused() {
        assert!(convert("local t = {} t.t = t return t").unwrap_err().contains("too deep"));
        assert!(convert("return {[1e9] = 1}").unwrap_err().contains("too long"));
    }
}
