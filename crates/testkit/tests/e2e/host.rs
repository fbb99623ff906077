//! What of a stack is on the machine, against what its sandboxes need: nothing may be missing and nothing left over.
//!
//! | what | as many as |
//! |---|---|
//! | machines, their directories, their control groups | machines that records name |
//! | leases, namespaces, links and rules of slots | those machines, and the slots that are kept ready |
//! | domain filters, their marks, their control groups | those machines whose policy names domains |
//! | tables in the uplink | one |

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use anyhow::{Context as _, Result};
use serde_json::Value;
use tokio::process::Command;
use wrenn_testkit::Stack;

use crate::soak::entries;

/// How many slots an agent keeps ready when nobody says.
const READY: usize = 8;
const SLOTS: &str = "/run/wrenn/slots";

/// Names of what is there, by kind.
type Names = BTreeMap<&'static str, BTreeSet<String>>;

/// What differs between what there is and what there is to be; none when nothing does.
pub(crate) async fn difference(stack: &Stack) -> Result<Option<String>> {
    let instance = stack.instance()?;
    let (there, slots) = (there(stack, &instance).await?, leases(&instance));
    let (mut wanted, used) = wanted(stack, &instance)?;
    // Which numbers are kept ready is for the agent to say, but not how many, and each of them is a whole slot.
    let ready = slots.difference(&used).count();
    let whole = used.is_subset(&slots) && ready == READY;
    for kind in ["namespaces", "links"] {
        wanted.insert(kind, slots.clone());
    }
    let differs = there.iter().any(|(kind, names)| wanted.get(kind) != Some(names));
    let text = || format!("there is {there:#?}\nthere is to be {wanted:#?}\nslots {slots:?}, used {used:?}");
    Ok((differs || !whole).then(text))
}

/// What the records ask for, and the slots that their machines use.
fn wanted(stack: &Stack, instance: &str) -> Result<(Names, BTreeSet<String>)> {
    let [mut machines, mut directories, mut filters, mut used] = [const { BTreeSet::new() }; 4];
    for id in entries(stack, "sandboxes")? {
        let record = stack.dir().join("agent/sandboxes").join(&id).join("record.json");
        // It is gone, or not there yet: then it is none that anything belongs to.
        let Ok(text) = fs::read(record) else { continue };
        let record: Value = serde_json::from_slice(&text)?;
        let machine = &record["machine"];
        let Some(layer) = machine["name"].as_str() else { continue };
        let slot = machine["slot"].as_u64().context("a machine has a slot")?.to_string();
        machines.insert(format!("{id}-{layer}"));
        directories.insert(layer.to_owned());
        let network = &record["settings"]["network"];
        let domains =
            ["allow_domains", "deny_domains"].map(|list| network[list].as_array().map_or(0, Vec::len));
        if domains != [0, 0] {
            filters.insert(slot.clone());
        }
        used.insert(slot);
    }
    let mut wanted = Names::from([
        ("tables", BTreeSet::from([format!("wrenn_{instance}")])),
        ("directories", directories),
        ("filters", filters.clone()),
        ("marks of filters", filters.clone()),
    ]);
    if groups(instance).is_some() {
        let of_filters = filters.iter().map(|slot| format!("filter-{slot}"));
        wanted.insert("groups", machines.iter().cloned().chain(of_filters).collect());
    }
    wanted.insert("machines", machines);
    Ok((wanted, used))
}

async fn there(stack: &Stack, instance: &str) -> Result<Names> {
    let slots = leases(instance);
    let mark = format!("guest=wrenn-{instance}-");
    let of_machine = |(name, _): (String, _)| name.split(',').next().unwrap_or_default().to_owned();
    let veths = stack.uplink().veths().await?;
    let ours = |number: &String| slots.contains(number);
    let marks = names(SLOTS).into_iter().filter_map(|name| name.strip_suffix(".filter").map(str::to_owned));
    let mut there = Names::from([
        ("machines", arguments(&mark).into_iter().map(of_machine).collect()),
        ("directories", names(format!("/run/wrenn/{instance}/vm"))),
        ("namespaces", namespaces(instance, &slots).await?),
        ("links", veths.iter().map(|name| name.replace("wrenn-v-", "")).collect()),
        ("tables", tables(stack).await?),
        // Whose a filter is, its slot says; and one whose slot is gone is in a group of the instance's, where there is one.
        ("filters", filters(instance).into_iter().map(|(number, _)| number).collect()),
        ("marks of filters", marks.filter(ours).collect()),
    ]);
    there.extend(groups(instance).map(|groups| ("groups", groups)));
    Ok(there)
}

/// The names in a directory; nothing where there is none.
fn names(path: impl AsRef<Path>) -> BTreeSet<String> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// What comes after a mark in the arguments of all processes, and whose it is.
fn arguments(mark: &str) -> Vec<(String, String)> {
    let of_process = |pid: String| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).into_owned();
        let argument = line.split('\0').find_map(|word| word.strip_prefix(mark).map(str::to_owned));
        argument.map(|argument| (argument, pid))
    };
    names("/proc").into_iter().filter_map(of_process).collect()
}

/// The domain filters of an instance's slots: the number of each slot, and the process.
pub(crate) fn filters(instance: &str) -> Vec<(String, String)> {
    let slots = leases(instance);
    let all = arguments("wrenn-filter-of-").into_iter();
    let all = all.filter_map(|(number, pid)| Some((number.parse::<u32>().ok()?.to_string(), pid)));
    all.filter(|(number, _)| slots.contains(number)).collect()
}

/// The slots that are an instance's.
fn leases(instance: &str) -> BTreeSet<String> {
    // The mark of a filter says whose it is too, and has no number for a name.
    let is_ours = |name: &String| {
        let owner =
            name.parse::<u32>().ok().and_then(|_| fs::read_to_string(Path::new(SLOTS).join(name)).ok());
        owner.is_some_and(|owner| owner == instance)
    };
    names(SLOTS).into_iter().filter(is_ours).collect()
}

/// The namespaces of an instance's slots, also those that nobody has a lease for: their links say whose they are.
async fn namespaces(instance: &str, slots: &BTreeSet<String>) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for name in names("/run/netns") {
        let Some(number) = name.strip_prefix("wrenn-ns-") else { continue };
        let is_leased = Path::new(SLOTS).join(number).exists();
        let is_ours = match is_leased {
            true => slots.contains(number),
            false => {
                let shown = Command::new("ip").args(["-n", &name, "link", "show"]).output().await?;
                String::from_utf8_lossy(&shown.stdout).contains(&format!("wrenn {instance} slot"))
            }
        };
        if is_ours {
            found.insert(number.to_owned());
        }
    }
    Ok(found)
}

/// The tables of rules of sandboxes in a stack's uplink, which is its own.
async fn tables(stack: &Stack) -> Result<BTreeSet<String>> {
    let arguments = ["netns", "exec", stack.uplink().name(), "nft", "list", "tables"];
    let listed = Command::new("ip").args(arguments).output().await?;
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    let tables = text.lines().filter_map(|line| line.split_whitespace().last());
    Ok(tables.filter(|name| name.starts_with("wrenn")).map(str::to_owned).collect())
}

/// The control groups of an instance; none where it has no directory of them.
pub(crate) fn groups(instance: &str) -> Option<BTreeSet<String>> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let mount = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"))?;
    let directory = Path::new(mount.split(' ').nth(1)?).join("wrenn").join(instance);
    let is_directory = |name: &String| directory.join(name).is_dir();
    directory.is_dir().then(|| names(&directory).into_iter().filter(is_directory).collect())
}
