//! KVM, in which a processor executes an instruction: a device that can be opened is no proof.

use std::{
    fs::File, fs::OpenOptions, io, os::fd::AsRawFd as _, os::fd::FromRawFd as _, os::raw::c_ulong, ptr,
};

use crate::in_lab;

const GET_API_VERSION: c_ulong = 0xae00;
const CREATE_VM: c_ulong = 0xae01;
const GET_VCPU_MMAP_SIZE: c_ulong = 0xae04;
const CREATE_VCPU: c_ulong = 0xae41;
const SET_USER_MEMORY_REGION: c_ulong = 0x4020_ae46;
const RUN: c_ulong = 0xae80;

const EXIT_HLT: u32 = 5;
/// Where `exit_reason` is in `struct kvm_run`.
const EXIT_REASON_AT: usize = 8;
const PAGE: usize = 4096;
/// Where a processor begins that was just reset, and `hlt`.
const RESET_VECTOR: usize = 0xffff_fff0;
const HLT: u8 = 0xf4;

/// `struct kvm_userspace_memory_region`.
#[repr(C)]
struct MemoryRegion {
    slot: u32,
    flags: u32,
    guest_address: u64,
    size: u64,
    address: u64,
}

/// A call that gives a number.
fn call(file: &File, request: c_ulong, argument: c_ulong) -> io::Result<i32> {
    // SAFETY: the callers below pass a number, or the address of the structure that the request reads.
    #[allow(unsafe_code)]
    let answer = unsafe { libc::ioctl(file.as_raw_fd(), request, argument) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer) }
}

/// A call that gives a new descriptor.
fn create(file: &File, request: c_ulong) -> io::Result<File> {
    let number = call(file, request, 0)?;
    // SAFETY: these requests give a descriptor that nobody else has.
    #[allow(unsafe_code)]
    Ok(unsafe { File::from_raw_fd(number) })
}

/// Memory that stays until the process ends.
fn map(size: usize, file: Option<&File>) -> *mut u8 {
    let (flags, descriptor) = match file {
        Some(file) => (libc::MAP_SHARED, file.as_raw_fd()),
        None => (libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1),
    };
    // SAFETY: a new mapping at an address of the kernel's choice overlaps with nothing.
    #[allow(unsafe_code)]
    let address = unsafe {
        libc::mmap(ptr::null_mut(), size, libc::PROT_READ | libc::PROT_WRITE, flags, descriptor, 0)
    };
    assert!(address != libc::MAP_FAILED, "{}", io::Error::last_os_error());
    address.cast()
}

#[test]
fn a_processor_of_a_virtual_machine_runs() {
    if !in_lab() {
        return;
    }
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm").unwrap();
    assert_eq!(call(&kvm, GET_API_VERSION, 0).unwrap(), 12);
    let machine = create(&kvm, CREATE_VM).unwrap();
    let memory = map(PAGE, None);
    // SAFETY: the offset is within the page that was just mapped, and no processor runs yet.
    #[allow(unsafe_code)]
    unsafe {
        memory.add(RESET_VECTOR % PAGE).write(HLT);
    }
    let region = MemoryRegion {
        slot: 0,
        flags: 0,
        guest_address: (RESET_VECTOR - RESET_VECTOR % PAGE) as u64,
        size: PAGE as u64,
        address: memory as u64,
    };
    call(&machine, SET_USER_MEMORY_REGION, ptr::from_ref(&region) as c_ulong).unwrap();
    let processor = create(&machine, CREATE_VCPU).unwrap();
    let size = usize::try_from(call(&kvm, GET_VCPU_MMAP_SIZE, 0).unwrap()).unwrap();
    let state = map(size, Some(&processor));
    call(&processor, RUN, 0).unwrap();
    // SAFETY: the mapping is longer than the offset, aligned to a page, and the processor stands still.
    #[allow(unsafe_code)]
    let reason = unsafe { state.add(EXIT_REASON_AT).cast::<u32>().read_volatile() };
    assert_eq!(reason, EXIT_HLT);
}
