//! What is known of devices where it outlives this process: in systemd's hands.

use super::*;

impl Supervisor {
    /// Takes what the supervisor before this one stored of devices that are still there.
    pub(super) fn take_on(&mut self, given: Given) {
        let given = given.take();
        let Some(store) = &mut self.store else { return };
        let run = &self.run;
        let is_wanted = |id, attached_unix_ms| {
            let state = run.state(id).ok().flatten();
            state.is_some_and(|state| state.attached_unix_ms == attached_unix_ms)
        };
        self.stored = store.take_on(given, is_wanted);
    }

    /// Keeps what is known of device `id` where it outlives this process.
    pub(super) fn store(&mut self, id: u32) {
        let (Some(store), Some(ward)) = (&mut self.store, self.wards.get(&id)) else { return };
        let state = self.run.state(id).ok().flatten();
        let Some(attached_unix_ms) = state.map(|state| state.attached_unix_ms) else { return };
        store.keep((id, attached_unix_ms), ward.program.as_ref(), &ward.parcel);
    }

    /// Device `id`; if it is not known, with what the supervisor before this one knew of it.
    pub(super) fn find_ward(&mut self, id: u32) -> &mut Ward {
        let stored = self.stored.remove(&id).unwrap_or_default();
        self.wards.entry(id).or_insert_with(|| {
            let Stored { program, parcel } = stored;
            Ward { program, parcel, ..Ward::default() }
        })
    }

    /// Lets go of what outlives this process of device `id`: files would stay open, and locked.
    pub(super) fn unstore(&mut self, id: u32) {
        self.stored.remove(&id);
        if let Some(store) = &mut self.store {
            store.drop(id);
        }
    }
}
