//! Every request and every answer, compared with Firecracker's published description.

use std::io::Write as _;

use serde_json::{Value, json};

use super::*;

const VARIABLE: &str = "WRENN_FIRECRACKER_OPENAPI";

/// One of each: the line, and its body with everything in it.
fn samples() -> Vec<(&'static str, Value)> {
    fn sample<R: Request>(request: &R) -> (&'static str, Value) {
        (R::LINE, serde_json::to_value(request).unwrap())
    }
    let mut samples = vec![
        sample(&MachineConfiguration {
            vcpu_count: 2,
            mem_size_mib: 256,
            smt: false,
            track_dirty_pages: true,
        }),
        sample(&BootSource { kernel_image_path: "/k".into(), initrd_path: "/i".into(), boot_args: "quiet" }),
        sample(&SerialDevice { serial_out_path: "console" }),
        sample(&Drive {
            drive_id: DISK,
            path_on_host: "disk",
            is_root_device: false,
            is_read_only: false,
            cache_type: CacheType::Writeback,
            rate_limiter: DiskRate { bytes: NonZeroU64::new(1), operations: None }.into(),
        }),
        sample(&DriveRate { drive_id: DISK, rate_limiter: DiskRate::default().into() }),
        sample(&PartialDrive { drive_id: DISK, path_on_host: "disk" }),
        sample(&NetworkInterface {
            iface_id: NETWORK,
            guest_mac: "02:fc:00:00:00:05",
            host_dev_name: "tap0",
        }),
        sample(&InstanceActionInfo { action_type: Action::InstanceStart }),
    ];
    samples.extend([BackendType::File, BackendType::Uffd].map(|backend_type| {
        sample(&SnapshotLoadParams {
            snapshot_path: "/s".into(),
            mem_backend: MemoryBackend { backend_type, backend_path: "/m".into() },
            track_dirty_pages: true,
            resume_vm: false,
            network_overrides: vec![NetworkOverride { iface_id: NETWORK, host_dev_name: "tap0" }],
        })
    }));
    samples.extend([VmState::Paused, VmState::Resumed].map(|state| sample(&Vm { state })));
    samples.extend([SnapshotType::Full, SnapshotType::Diff].map(|snapshot_type| {
        sample(&SnapshotCreateParams {
            snapshot_type,
            snapshot_path: "/s".into(),
            mem_file_path: "/m".into(),
        })
    }));
    samples
}

/// The published description.
struct Description(Value);

impl Description {
    /// What a schema is that refers to another one.
    fn follow<'a>(&'a self, schema: &'a Value) -> &'a Value {
        match schema["$ref"].as_str().and_then(|name| name.strip_prefix("#/definitions/")) {
            Some(name) => &self.0["definitions"][name],
            None => schema,
        }
    }

    /// The method of a path that it describes, whose variable parts are in braces.
    fn operation(&self, line: &str) -> &Value {
        let (method, path) = line.split_once(' ').unwrap();
        let fits = |described: &str| {
            let (mut described, mut path) = (described.split('/'), path.split('/'));
            loop {
                match (described.next(), path.next()) {
                    (None, None) => return true,
                    (Some(described), Some(path)) if described == path || described.starts_with('{') => {}
                    _ => return false,
                }
            }
        };
        let paths = self.0["paths"].as_object().unwrap();
        let found = paths.iter().find(|(described, _)| fits(described));
        let (_, methods) = found.unwrap_or_else(|| panic!("{line} is not described"));
        let operation = &methods[method.to_lowercase()];
        assert!(operation.is_object(), "{line} is not described");
        operation
    }

    /// A value has the properties of a schema, of the right kinds, and all that are required.
    fn check(&self, schema: &Value, value: &Value, place: &str) {
        let schema = self.follow(schema);
        let kind = match value {
            Value::String(_) => "string",
            Value::Bool(_) => "boolean",
            Value::Number(_) => "integer",
            Value::Array(_) => "array",
            Value::Object(_) => "object",
            Value::Null => "null",
        };
        assert_eq!(schema["type"], kind, "{place}");
        if let Some(words) = schema["enum"].as_array() {
            assert!(words.contains(value), "{place}: {value} is none of {words:?}");
        }
        for item in value.as_array().into_iter().flatten() {
            self.check(&schema["items"], item, place);
        }
        let Some(fields) = value.as_object() else { return };
        for (name, value) in fields {
            let property = &schema["properties"][name];
            assert!(property.is_object(), "{place}: {name} is not described");
            self.check(property, value, &format!("{place}: {name}"));
        }
        for required in schema["required"].as_array().into_iter().flatten() {
            assert!(fields.contains_key(required.as_str().unwrap()), "{place}: {required} is missing");
        }
    }
}

#[test]
fn requests_and_answers_are_those_that_firecracker_describes() {
    let Some(path) = std::env::var_os(VARIABLE) else {
        let why = format!("skipped: {VARIABLE} does not name Firecracker's description of its API\n");
        drop(std::io::stderr().write_all(why.as_bytes()));
        return;
    };
    let text = std::fs::read_to_string(path).unwrap();
    let description = Description(yaml_serde::from_str(&text).unwrap());
    for (line, body) in samples() {
        let operation = description.operation(line);
        let parameters = operation["parameters"].as_array().unwrap();
        let parameter = parameters.iter().find(|parameter| parameter["in"] == "body").unwrap();
        description.check(&parameter["schema"], &body, line);
        assert!(operation["responses"]["204"].is_object(), "{line} is answered otherwise");
    }
    // Of answers everything that we read must be there, and be what we read.
    let answer = &description.operation(InstanceInfo::LINE)["responses"]["200"]["schema"];
    let answer = description.follow(answer);
    for name in ["id", "state"] {
        assert!(answer["required"].as_array().unwrap().contains(&json!(name)), "{name} may be missing");
        assert_eq!(answer["properties"][name]["type"], "string");
    }
    for state in answer["properties"]["state"]["enum"].as_array().unwrap() {
        let known: Result<InstanceState, _> = serde_json::from_value(state.clone());
        assert!(known.is_ok(), "the state {state} is not known");
    }
    let fault = &description.0["definitions"]["Error"]["properties"]["fault_message"];
    assert_eq!(fault["type"], "string");
}

#[test]
fn the_names_in_paths_are_those_in_bodies() {
    assert!(Drive::LINE.ends_with(DISK) && PartialDrive::LINE.ends_with(DISK));
    assert!(NetworkInterface::LINE.ends_with(NETWORK));
    let (_, body) = samples().pop().unwrap();
    assert_eq!(body, json!({"snapshot_type": "Diff", "snapshot_path": "/s", "mem_file_path": "/m"}));
}
