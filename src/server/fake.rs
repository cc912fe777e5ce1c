//! A front end without a kernel, for the tests of this module.

use super::kernel::{
    BeforeTakeover, Counters, DeviceShape, Kernel, KernelDevice, Milestones, Served, Watch, Wish,
};
use super::portable::Kept;
use super::process::Process;
use super::run_dir::RunDir;
use super::serve::Housing;
use super::state::LayerFile;
use super::supervisor::ParcelFiles;
use crate::disk::{Disk, Geometry, Worker};
use crate::error::{Error, ErrorKind, Result};
use crate::server::run_dir::Slot;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::path::PathBuf;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

/// What the fake knows and what it is told to do.
#[derive(Default)]
pub(super) struct Host {
    /// Every device of the host: its server's pid, or 0 for a dead one.
    pub(super) devices: BTreeMap<u32, u32>,
    /// Devices that wait for a new server.
    pub(super) quiesced: Vec<u32>,
    /// Whom to tell when a device is over.
    pub(super) on_gone: BTreeMap<u32, Box<dyn Fn() + Send>>,
    /// Numbers that are taken, though no list shows them.
    pub(super) taken: Vec<u32>,
    /// Numbers that somebody has mounted.
    pub(super) mounted: Vec<u32>,
    /// Numbers that the kernel does not let go of.
    pub(super) stuck: Vec<u32>,
    /// What happened, in order.
    pub(super) events: Vec<String>,
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Host({:?})", self.devices)
    }
}

#[derive(Clone, Debug, Default)]
pub(super) struct FakeKernel(Arc<Mutex<Host>>);

impl FakeKernel {
    pub(super) fn host(&self) -> MutexGuard<'_, Host> {
        self.0.lock().unwrap()
    }

    /// Somebody else deletes a device.
    pub(super) fn vanish(&self, id: u32) {
        let mut host = self.host();
        host.devices.remove(&id);
        let on_gone = host.on_gone.remove(&id);
        drop(host);
        on_gone.unwrap()();
    }

    fn take_away(&self, id: u32, how: &str) -> Result<()> {
        let mut host = self.host();
        host.events.push(format!("{how} {id}"));
        if host.stuck.contains(&id) {
            return Err(Error::new(ErrorKind::Timeout, "stuck in the kernel"));
        }
        match host.devices.remove(&id) {
            Some(_) => Ok(()),
            None => Err(Error::new(ErrorKind::NotFound, "no such device")),
        }
    }
}

impl Kernel for FakeKernel {
    type Device = FakeDevice;

    fn check(&self) -> Result<()> {
        Ok(())
    }

    fn start<D: Disk>(&self, disk: Arc<D>, wish: &Wish, watch: Watch) -> Result<FakeDevice> {
        let mut host = self.host();
        if host.taken.contains(&wish.id) || host.devices.contains_key(&wish.id) {
            return Err(Error::new(ErrorKind::Busy, "the number is taken"));
        }
        assert!(disk.geometry().sectors > 0);
        host.devices.insert(wish.id, Process::current().pid);
        host.events.push(format!("start {}", wish.id));
        host.on_gone.insert(wish.id, watch.on_gone);
        Ok(FakeDevice { id: wish.id, kernel: self.clone() })
    }

    fn take_over<D: Disk>(
        &self,
        _disk: Arc<D>,
        id: u32,
        before: BeforeTakeover,
        _watch: Watch,
    ) -> Result<FakeDevice> {
        before()?;
        self.host().events.push(format!("take over {id}"));
        Ok(FakeDevice { id, kernel: self.clone() })
    }

    fn repeats_takeovers(&self) -> bool {
        true
    }

    fn list(&self) -> Result<Vec<KernelDevice>> {
        let host = self.host();
        let device = |(id, pid): (&u32, &u32)| {
            let quiesced = host.quiesced.contains(id);
            KernelDevice { id: *id, live: *pid > 0 && !quiesced, quiesced, server_pid: *pid }
        };
        Ok(host.devices.iter().map(device).collect())
    }

    fn delete(&self, id: u32) -> Result<()> {
        self.take_away(id, "delete")
    }

    fn check_resize(&self) -> Result<()> {
        Ok(())
    }

    fn resize(&self, id: u32, sectors: u64) -> Result<()> {
        self.host().events.push(format!("resize {id} to {sectors}"));
        Ok(())
    }

    fn hold(&self, id: u32) -> Result<File> {
        if self.host().mounted.contains(&id) {
            return Err(Error::new(ErrorKind::Busy, "mounted"));
        }
        Ok(File::open("/dev/null").unwrap())
    }
}

#[derive(Debug)]
pub(super) struct FakeDevice {
    id: u32,
    kernel: FakeKernel,
}

impl Served for FakeDevice {
    fn counters(&self) -> Option<Counters> {
        Some(Counters { last_error: Some("none yet".to_owned()), ..Counters::default() })
    }

    fn is_gone(&mut self) -> bool {
        !self.kernel.host().devices.contains_key(&self.id)
    }

    fn shape(&self) -> DeviceShape {
        DeviceShape { queues: 1, depth: 128 }
    }

    fn milestones(&self) -> Milestones {
        Milestones { quiesced: None, flowing: Instant::now() }
    }

    fn abandon(self) {
        self.kernel.host().events.push(format!("abandon {}", self.id));
    }

    fn stop(self, held: Option<File>) -> Result<()> {
        let how = if held.is_some() { "stop held" } else { "stop" };
        match self.kernel.take_away(self.id, how) {
            // Taken away from outside: then nothing is left to do.
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            outcome => outcome,
        }
    }
}

/// A disk of one sector.
#[derive(Debug, Default)]
pub(super) struct FakeDisk {
    /// Who is told that it was handed on.
    pub(super) told: Option<FakeKernel>,
}

impl Disk for FakeDisk {
    type Worker = FakeDisk;

    fn geometry(&self) -> Geometry {
        Geometry {
            sectors: 1,
            read_only: true,
            optimal_io_bytes: 4096,
            discard_granularity_bytes: None,
        }
    }

    fn worker(&self) -> Result<FakeDisk> {
        Ok(FakeDisk::default())
    }
}

impl Kept for FakeDisk {
    fn pack(&self) -> Result<ParcelFiles> {
        Ok(vec![File::open("/dev/null").unwrap().into()])
    }

    fn layer_files(&self) -> Vec<LayerFile> {
        Vec::new()
    }

    fn hand_on(&self) {
        self.told.iter().for_each(|kernel| kernel.host().events.push("hand on".to_owned()));
    }
}

impl Worker for FakeDisk {
    fn read(&mut self, _start_sector: u64, dst: &mut [u8]) -> Result<()> {
        dst.fill(0);
        Ok(())
    }
}

/// A server that lives in a thread of the test. It announces to a channel; with the receiver gone
/// nobody hears it.
#[derive(Debug)]
pub(super) struct Thread {
    pub(super) announced: Sender<u32>,
}

impl Housing for Thread {
    fn settle(&self, slot: &Slot) -> Result<Option<PathBuf>> {
        Ok(Some(slot.log()))
    }

    fn move_in(&self) -> Result<()> {
        Ok(())
    }

    fn leave_mounts(&self, _run: &RunDir, _folders: &[PathBuf]) -> Result<()> {
        Ok(())
    }

    fn announce(&self, id: u32) -> Result<()> {
        let nobody = |_| Error::new(ErrorKind::Io, "nobody listens");
        self.announced.send(id).map_err(nobody)
    }
}
