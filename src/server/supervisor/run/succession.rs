//! Starting the process that takes a device over.

use super::*;
use crate::server::environment;
use crate::server::supervisor::store::SYSTEMD_VARIABLES;

impl Supervisor {
    /// Starts a process that takes device `id` over.
    pub(super) fn start_successor(&mut self, id: u32, aim: Aim) {
        match self.try_start_successor(id, aim) {
            Ok(()) => {}
            Err(error) => {
                tracing::error!(dev_id = id, "no successor: {error:#}");
                if let Some(ward) = self.wards.get_mut(&id) {
                    ward.entering = None;
                    ward.last_error = Some(Refusal::of(&error));
                }
                self.successor_is_gone(id);
            }
        }
    }

    fn try_start_successor(&mut self, id: u32, aim: Aim) -> Result<()> {
        let is_pausing = self.unscoped_until.is_some_and(|until| Instant::now() < until);
        let Some(ward) = self.wards.get_mut(&id) else { return Ok(()) };
        ward.last_error = None;
        let (ours, theirs) = PacketSocket::pair()?;
        ours.set_patience(Some(SEND_PATIENCE))?;
        let theirs = theirs.into_file();
        let program = program_of(ward, aim);
        let state = self.run.state(id).ok().flatten();
        let environment = state.map(|state| state.environment).unwrap_or_default();
        let give = |mut command: Command| -> std::io::Result<Child> {
            environment::give(&mut command, &environment);
            for variable in SYSTEMD_VARIABLES {
                command.env_remove(variable);
            }
            command
                .env(RUN_DIR_VARIABLE, self.run.path())
                .stdin(Stdio::from(theirs.try_clone()?))
                .stdout(Stdio::null())
                .stderr(Stdio::inherit())
                .spawn()
        };
        let arguments = [SUCCESSOR_COMMAND, "--id", &id.to_string()].map(OsString::from);
        let scoped = systemd::in_scope(Owner::Device(id), &program, &arguments)
            .filter(|_| !ward.unscoped && !is_pausing)
            .map(&give);
        if let Some(Err(error)) = &scoped {
            tracing::warn!(dev_id = id, "a successor gets no unit of its own: {error}");
        }
        let child = if let Some(Ok(child)) = scoped {
            let deadline = Instant::now() + systemd::UNIT_PATIENCE;
            ward.entering = Some(Entering { program, deadline, aim });
            child
        } else {
            ward.entering = None;
            let mut command = Command::new(program);
            command.arg0("obd-ublk").args(&arguments);
            give(command).map_err(|error| Error::io("start a successor process", &error))?
        };
        drop(theirs);
        ward.successor_pid = Some(child.id());
        ward.deadline = Some(Instant::now() + Duration::from_secs(RECOVERY_SECONDS_MAX));
        self.children.push(child);
        let sent = send_parcel(&ours, &ward.parcel);
        let seen_ns = ward.seen_ns;
        let is_dead = ward.server.is_none();
        let link = self.add_link(ours, Role::Successor(id));
        if let Some(ward) = self.wards.get_mut(&id) {
            ward.successor = Some(link);
        }
        if let Err(error) = sent {
            // Its end of file tells the child to end.
            self.links.remove(&link);
            return Err(error.context("hand over the parcel"));
        }
        if is_dead {
            self.say(link, &Note::Go { seen_ns });
        }
        Ok(())
    }
}

/// Where the program of a successor lies, for this process's children and what they become.
fn program_of(ward: &Ward, aim: Aim) -> PathBuf {
    let own = format!("/proc/{}", std::process::id());
    let file = match aim {
        Aim::Same => ward.program.as_ref(),
        Aim::Upgrade => ward.upgrade.as_ref().and_then(|upgrade| upgrade.program.as_ref()),
    };
    let path = match file {
        Some(file) => PathBuf::from(format!("{own}/fd/{}", file.as_raw_fd())),
        None => PathBuf::from(format!("{own}/exe")),
    };
    // A path that names the process for people, if it leads there.
    let named = std::env::current_exe().ok();
    named.filter(|named| systemd::is_same_file(named, &path)).unwrap_or(path)
}
