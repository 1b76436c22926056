//! Kernel modules with everything they need, in the order of loading.
//!
//! A module names what it needs in its own `.modinfo` section, so neither
//! `depmod` nor its files are needed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use object::{Object as _, ObjectSection as _};

use super::kernel;

/// Needs that no `depends=` names: libcrc32c asks the crypto layer for an
/// algorithm at run time, and without it the whole netfilter family fails to
/// load with "unknown symbol".
const HIDDEN_NEEDS: &[(&str, &str)] = &[("libcrc32c", "crc32c_generic")];

/// A module ready to be loaded.
#[derive(Debug, Clone)]
pub struct Module {
    /// Name with underscores, as the kernel knows it.
    pub name: String,
    /// The uncompressed ELF file.
    pub content: Vec<u8>,
}

/// The modules of one kernel package.
#[derive(Debug)]
pub struct Modules {
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

impl Modules {
    /// Looks through an unpacked kernel package.
    ///
    /// # Errors
    ///
    /// If there is not exactly one kernel's module folder below `root`.
    pub fn scan(root: &Path) -> Result<Self> {
        let mut kernels = Vec::new();
        for place in ["lib/modules", "usr/lib/modules"] {
            if let Ok(found) = fs::read_dir(root.join(place)) {
                kernels.extend(found.flatten().map(|entry| entry.path()));
            }
        }
        let [folder] = kernels.as_slice() else {
            bail!(
                "{} kernels under {}, not one",
                kernels.len(),
                root.display()
            );
        };
        let mut files = BTreeMap::new();
        super::walk(folder, &mut |path| {
            if let Some(name) = module_name(path) {
                files.insert(name, path.to_path_buf());
            }
        })?;
        let builtin = fs::read_to_string(folder.join("modules.builtin"))
            .context("the kernel package has no modules.builtin")?
            .lines()
            .filter_map(|line| module_name(Path::new(line)))
            .collect();
        Ok(Self { files, builtin })
    }

    /// The wanted modules and all that they need, each after its needs.
    ///
    /// Names that the kernel has built in are left out.
    ///
    /// # Errors
    ///
    /// If a module is missing or unreadable.
    pub fn closure(&self, wanted: &[&str]) -> Result<Vec<Module>> {
        let mut loaded = BTreeSet::new();
        let mut order = Vec::new();
        for name in wanted {
            self.visit(&normal(name), &mut loaded, &mut order)?;
        }
        Ok(order)
    }

    fn visit(
        &self,
        name: &str,
        loaded: &mut BTreeSet<String>,
        order: &mut Vec<Module>,
    ) -> Result<()> {
        if self.builtin.contains(name) || !loaded.insert(name.to_owned()) {
            return Ok(());
        }
        let path = self
            .files
            .get(name)
            .with_context(|| format!("the kernel has no module {name}"))?;
        let content = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let plain = path.extension().is_some_and(|extension| extension == "ko");
        let content = if plain {
            content
        } else {
            kernel::decompress(&content)?
        };
        let mut needs = needs(&content).with_context(|| format!("module {name} is damaged"))?;
        needs.extend(
            HIDDEN_NEEDS
                .iter()
                .filter(|(module, need)| *module == name && self.files.contains_key(*need))
                .map(|(_, need)| (*need).to_owned()),
        );
        for need in needs {
            self.visit(&need, loaded, order)?;
        }
        order.push(Module {
            name: name.to_owned(),
            content,
        });
        Ok(())
    }
}

/// `.../xen-netback.ko.xz` is the module `xen_netback`.
fn module_name(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let (stem, packing) = name.split_once(".ko")?;
    matches!(packing, "" | ".xz" | ".zst" | ".gz").then(|| normal(stem))
}

fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// The names after `depends=` in a module's `.modinfo`.
fn needs(module: &[u8]) -> Result<Vec<String>> {
    let file = object::File::parse(module)?;
    let section = file
        .section_by_name(".modinfo")
        .context("no .modinfo section")?;
    Ok(section
        .data()?
        .split(|byte| *byte == 0)
        .filter_map(|entry| std::str::from_utf8(entry).ok()?.strip_prefix("depends="))
        .flat_map(|list| list.split(','))
        .filter(|name| !name.is_empty())
        .map(normal)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_names_become_module_names() {
        let name = |text: &str| module_name(Path::new(text));
        assert_eq!(
            name("kernel/drivers/net/xen-netback/xen-netback.ko"),
            Some("xen_netback".into())
        );
        assert_eq!(name("kernel/net/dummy.ko.xz"), Some("dummy".into()));
        assert_eq!(name("modules.order"), None);
        assert_eq!(name("a.kobold"), None);
    }
}
