//! What Linux tells about this process in `/proc` and `/sys`: CPUs allowed, quota, caches, memory, huge pages.
//!
//! Everything is a plain file read below a root directory, so that a test can lay out a machine of its own, and
//! so that another system, where the files do not exist, simply answers `None`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The file tree in which to look; `/` but for tests.
pub(crate) struct Linux {
    root: PathBuf,
}

/// A cache as `/sys/devices/system/cpu/cpu*/cache/index*` describes it.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SysCache {
    pub(crate) level: u8,
    /// `Data`, `Instruction` or `Unified`.
    pub(crate) kind: String,
    pub(crate) bytes: u64,
    /// The logical CPUs that share it.
    pub(crate) cpus: BTreeSet<usize>,
}

/// Counters of processor time, in ticks of the system's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticks {
    /// All processors together, at work or stolen by another machine on the same hardware.
    busy: u64,
    /// All that has passed.
    all: u64,
    /// Of this process.
    own: u64,
    processors: usize,
}

impl Ticks {
    /// How many processors others have used since `begin`, and how many there are; `None` if no time has passed.
    pub(crate) fn others_since(&self, begin: &Self) -> Option<(f64, usize)> {
        let all = self.all.checked_sub(begin.all).filter(|all| *all > 0)?;
        let (busy, own) = (self.busy.saturating_sub(begin.busy), self.own.saturating_sub(begin.own));
        Some((busy.saturating_sub(own) as f64 / all as f64 * self.processors as f64, self.processors))
    }
}

/// A limit that may bind through a control group.
struct Limit<'a> {
    /// Controller name of version 1.
    controller: &'a str,
    /// Files of version 1 and version 2.
    files: [&'a [&'a str]; 2],
}

impl Linux {
    pub(crate) fn host() -> Self {
        Self::at("/")
    }

    pub(crate) fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    fn read(&self, path: impl AsRef<Path>) -> Option<String> {
        let text = fs::read_to_string(self.root.join(path)).ok()?;
        Some(text.trim().to_owned())
    }

    /// How processor time has been spent so far.
    pub(crate) fn ticks(&self) -> Option<Ticks> {
        let text = self.read("proc/stat")?;
        let mut lines = text.lines();
        let numbers =
            |text: &str| -> Vec<u64> { text.split_whitespace().map_while(|word| word.parse().ok()).collect() };
        // user nice system idle iowait irq softirq steal
        let total = numbers(lines.next()?.strip_prefix("cpu ")?);
        let all = total.iter().take(8).sum::<u64>();
        let idle: u64 = total.get(3)? + total.get(4)?;
        let processors = lines.take_while(|line| line.starts_with("cpu")).count();
        // The name of the program, in brackets, may hold anything.
        let stat = self.read("proc/self/stat")?;
        let own: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let [user, system] = [own.get(11)?.parse::<u64>().ok()?, own.get(12)?.parse::<u64>().ok()?];
        Some(Ticks { busy: all.saturating_sub(idle), all, own: user + system, processors })
    }

    /// The logical CPUs that this process may run on.
    pub(crate) fn allowed_cpus(&self) -> Option<BTreeSet<usize>> {
        parse_list(field(&self.read("proc/self/status")?, "Cpus_allowed_list")?)
    }

    /// The logical CPUs that are switched on.
    pub(crate) fn online_cpus(&self) -> Option<BTreeSet<usize>> {
        parse_list(&self.read("sys/devices/system/cpu/online")?)
    }

    /// How many physical cores `cpus` lie on.
    pub(crate) fn physical_cores(&self, cpus: &BTreeSet<usize>) -> Option<usize> {
        let siblings = |cpu: &usize| {
            let topology = format!("sys/devices/system/cpu/cpu{cpu}/topology");
            self.read(format!("{topology}/core_cpus_list"))
                .or_else(|| self.read(format!("{topology}/thread_siblings_list")))
        };
        let cores: Option<BTreeSet<String>> = cpus.iter().map(siblings).collect();
        cores.map(|cores| cores.len()).filter(|cores| *cores > 0)
    }

    /// The caches that `cpus` use, each once, ordered by level.
    pub(crate) fn caches(&self, cpus: &BTreeSet<usize>) -> BTreeSet<SysCache> {
        let one = |cpu: &usize, index: usize| {
            let directory = format!("sys/devices/system/cpu/cpu{cpu}/cache/index{index}");
            let entry = |name: &str| self.read(format!("{directory}/{name}"));
            Some(SysCache {
                level: entry("level")?.parse().ok()?,
                kind: entry("type")?,
                bytes: parse_size(&entry("size")?)?,
                cpus: parse_list(&entry("shared_cpu_list")?)?,
            })
        };
        cpus.iter().flat_map(|cpu| (0..8).map_while(move |index| one(cpu, index))).collect()
    }

    /// CPUs' worth of time that control groups grant: the smallest quota from this process's group up to the root.
    pub(crate) fn cpu_quota(&self) -> Option<f64> {
        let limit = Limit { controller: "cpu", files: [&["cpu.cfs_quota_us", "cpu.cfs_period_us"], &["cpu.max"]] };
        let quotas = self.limits(&limit).into_iter().filter_map(|words| {
            let (quota, period) = (words.first()?.parse::<f64>().ok()?, words.get(1)?.parse::<f64>().ok()?);
            (quota > 0.0 && period > 0.0).then_some(quota / period)
        });
        quotas.min_by(f64::total_cmp)
    }

    /// Bytes of memory that can still be had: what the system has, or less if a control group says so.
    pub(crate) fn available_memory(&self) -> Option<u64> {
        let limit = Limit {
            controller: "memory",
            files: [&["memory.limit_in_bytes", "memory.usage_in_bytes"], &["memory.max", "memory.current"]],
        };
        let groups = self.limits(&limit).into_iter().filter_map(|words| {
            let (limit, used) = (words.first()?.parse::<u64>().ok()?, words.get(1)?.parse::<u64>().ok()?);
            Some(limit.saturating_sub(used))
        });
        groups.chain(self.meminfo("MemAvailable")).min()
    }

    /// A line of `/proc/meminfo` in bytes, or as a count where it has no unit.
    pub(crate) fn meminfo(&self, name: &str) -> Option<u64> {
        let text = self.read("proc/meminfo")?;
        let mut words = field(&text, name)?.split_whitespace();
        let value: u64 = words.next()?.parse().ok()?;
        match words.next() {
            Some("kB") => value.checked_mul(1024),
            _ => Some(value),
        }
    }

    /// The chosen word of `always [madvise] never`.
    pub(crate) fn transparent_huge_pages(&self) -> Option<String> {
        let text = self.read("sys/kernel/mm/transparent_hugepage/enabled")?;
        let (_, rest) = text.split_once('[')?;
        Some(rest.split_once(']')?.0.to_owned())
    }

    /// The page size that the kernel told this process when it started it.
    pub(crate) fn page_bytes(&self) -> Option<u64> {
        const AT_PAGESZ: usize = 6;
        let vector = fs::read(self.root.join("proc/self/auxv")).ok()?;
        let words = vector.as_chunks::<{ size_of::<usize>() }>().0;
        let words: Vec<usize> = words.iter().map(|bytes| usize::from_ne_bytes(*bytes)).collect();
        words.chunks_exact(2).find(|pair| pair[0] == AT_PAGESZ).map(|pair| pair[1] as u64)
    }

    /// The first value of a field of `/proc/cpuinfo`, which is how an ARM CPU is known.
    #[cfg(any(not(target_arch = "x86_64"), test))]
    pub(crate) fn cpuinfo(&self, name: &str) -> Option<String> {
        Some(field(&self.read("proc/cpuinfo")?, name)?.to_owned())
    }

    /// The words of a limit's files, for this process's control group and all above it.
    fn limits(&self, limit: &Limit<'_>) -> Vec<Vec<String>> {
        let Some(groups) = self.read("proc/self/cgroup") else { return Vec::new() };
        let mut found = Vec::new();
        for line in groups.lines() {
            let mut parts = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(group)) = (parts.next(), parts.next()) else { continue };
            let (mount, files) = if controllers.is_empty() {
                ("sys/fs/cgroup".to_owned(), limit.files[1])
            } else if controllers.split(',').any(|name| name == limit.controller) {
                (format!("sys/fs/cgroup/{controllers}"), limit.files[0])
            } else {
                continue;
            };
            // In a container the group's own path may not be mounted; the mount itself is then this group.
            for directory in Path::new(group.trim_start_matches('/')).ancestors() {
                let directory = Path::new(&mount).join(directory);
                let texts: Option<Vec<String>> = files.iter().map(|file| self.read(directory.join(file))).collect();
                found.extend(texts.map(|texts| texts.join(" ").split_whitespace().map(str::to_owned).collect()));
            }
        }
        found
    }
}

/// The value of `name: value` in a text of such lines.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim())
    })
}

/// `0-3,8` as a set.
fn parse_list(text: &str) -> Option<BTreeSet<usize>> {
    let mut set = BTreeSet::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        // No machine has more; a strange file must not make us fill the memory.
        if last >= 1 << 16 {
            return None;
        }
        set.extend(first..=last);
    }
    Some(set)
}

/// `32768K` in bytes.
fn parse_size(text: &str) -> Option<u64> {
    let (number, unit) = match text.strip_suffix('K') {
        Some(number) => (number, 1 << 10),
        None => text.strip_suffix('M').map_or((text, 1), |number| (number, 1 << 20)),
    };
    number.parse::<u64>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine laid out as files.
    fn machine(files: &[(&str, &str)]) -> (tempfile::TempDir, Linux) {
        let directory = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = directory.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let linux = Linux::at(directory.path());
        (directory, linux)
    }

    #[test]
    fn a_list_of_cpus_is_read_with_ranges() {
        assert_eq!(parse_list("0-2,5"), Some(BTreeSet::from([0, 1, 2, 5])));
        for strange in ["", "a", "1-", "0-99999999999", "0-4000000"] {
            assert_eq!(parse_list(strange), None, "{strange}");
        }
    }

    #[test]
    fn the_smallest_quota_on_the_way_to_the_root_counts_in_version_2() {
        let (_keep, linux) = machine(&[
            ("proc/self/cgroup", "0::/outer/inner\n"),
            ("sys/fs/cgroup/outer/inner/cpu.max", "max 100000\n"),
            ("sys/fs/cgroup/outer/cpu.max", "150000 100000\n"),
            ("sys/fs/cgroup/outer/memory.max", "1000\n"),
            ("sys/fs/cgroup/outer/memory.current", "400\n"),
            ("proc/meminfo", "MemAvailable:   2 kB\n"),
        ]);
        assert_eq!(linux.cpu_quota(), Some(1.5));
        assert_eq!(linux.available_memory(), Some(600));
    }

    #[test]
    fn quotas_of_version_1_are_read_from_their_controllers() {
        let (_keep, linux) = machine(&[
            ("proc/self/cgroup", "3:cpu,cpuacct:/job\n2:memory:/job\n0::/\n"),
            ("sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us", "-1"),
            ("sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us", "100000"),
            ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "200000"),
            ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000"),
            ("sys/fs/cgroup/memory/job/memory.limit_in_bytes", "9223372036854771712"),
            ("sys/fs/cgroup/memory/job/memory.usage_in_bytes", "5"),
            ("proc/meminfo", "MemTotal: 9 kB\nMemAvailable:   2 kB\nHugePages_Total: 7\n"),
        ]);
        assert_eq!(linux.cpu_quota(), Some(2.0));
        assert_eq!(linux.available_memory(), Some(2048));
        assert_eq!(linux.meminfo("HugePages_Total"), Some(7));
    }

    #[test]
    fn caches_that_two_cpus_share_are_listed_once() {
        let mut files = Vec::new();
        for cpu in 0..2 {
            for (index, [level, kind, size]) in [["1", "Data", "32K"], ["3", "Unified", "32M"]].into_iter().enumerate()
            {
                let shared = if level == "3" { "0-1".to_owned() } else { cpu.to_string() };
                for (name, value) in [("level", level), ("type", kind), ("size", size), ("shared_cpu_list", &shared)] {
                    let path = format!("sys/devices/system/cpu/cpu{cpu}/cache/index{index}/{name}");
                    files.push((path, value.to_owned()));
                }
            }
        }
        let files: Vec<(&str, &str)> = files.iter().map(|(path, text)| (path.as_str(), text.as_str())).collect();
        let (_keep, linux) = machine(&files);
        let caches = linux.caches(&BTreeSet::from([0, 1]));
        assert_eq!(caches.len(), 3);
        let last = caches.last().unwrap();
        assert_eq!((last.level, last.bytes, last.cpus.len()), (3, 32 << 20, 2));
    }

    #[test]
    fn a_system_without_these_files_answers_nothing() {
        let (_keep, linux) = machine(&[]);
        assert_eq!(linux.allowed_cpus(), None);
        assert_eq!(linux.online_cpus(), None);
        assert_eq!(linux.cpu_quota(), None);
        assert_eq!(linux.available_memory(), None);
        assert_eq!(linux.page_bytes(), None);
        assert_eq!(linux.cpuinfo("CPU part"), None);
        assert_eq!(linux.transparent_huge_pages(), None);
        assert_eq!(linux.physical_cores(&BTreeSet::from([0])), None);
        assert!(linux.caches(&BTreeSet::from([0])).is_empty());
    }
}
