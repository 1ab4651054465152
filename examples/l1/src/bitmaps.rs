//! The permission maps of this hypervisor: MSRs and I/O ports. One of each per processor would be legal too; scenarios
//! that use them run on one processor.

use crate::Global;

/// MSR permission map: 8 KiB, two bits an MSR, three ranges of 8,192 MSRs (APM 15.11).
#[repr(C, align(4096))]
pub struct Msrpm([u8; 8192]);

/// I/O permission map: 12 KiB, one bit a port.
#[repr(C, align(4096))]
pub struct Iopm([u8; 12288]);

static MSRPM: Global<Msrpm> = Global::new(Msrpm([0; 8192]));
static IOPM: Global<Iopm> = Global::new(Iopm([0; 12288]));

pub fn msrpm() -> &'static mut Msrpm {
    MSRPM.get()
}

pub fn iopm() -> &'static mut Iopm {
    IOPM.get()
}

impl Msrpm {
    pub fn clear(&mut self) {
        self.0 = [0; 8192];
    }

    /// Every MSR exits.
    pub fn fill(&mut self) {
        self.0 = [0xFF; 8192];
    }

    pub fn intercept(&mut self, msr: u32, read: bool, write: bool) {
        let (range, first) = match msr {
            0..=0x1FFF => (0, 0),
            0xC000_0000..=0xC000_1FFF => (1, 0xC000_0000),
            _ => (2, 0xC001_0000),
        };
        let bit = range * 0x4000 + (msr - first) as usize * 2;
        self.0[bit / 8] |= (u8::from(read) | u8::from(write) << 1) << (bit % 8);
    }

    pub fn address(&self) -> u64 {
        (&raw const *self) as u64
    }
}

impl Msrpm {
    /// The same, as VMX's MSR bitmap: reads low, reads high, writes low, writes high, 1 KiB each.
    pub fn to_vmx(&self, map: &mut [u8; 4096]) {
        for n in 0..2 * 8192usize {
            // Two bits an MSR: read, write.
            let rights = self.0[n / 4] >> (n % 4 * 2);
            map[n / 8] |= (rights & 1) << (n % 8);
            map[2048 + n / 8] |= (rights >> 1 & 1) << (n % 8);
        }
    }
}

impl Iopm {
    /// The same, as VMX's I/O bitmaps A and B.
    pub fn to_vmx(&self, map: &mut [u8; 8192]) {
        map.copy_from_slice(&self.0[..8192]);
    }

    pub fn clear(&mut self) {
        self.0 = [0; 12288];
    }

    /// Every port exits.
    pub fn fill(&mut self) {
        self.0 = [0xFF; 12288];
    }

    pub fn intercept(&mut self, port: u16) {
        self.0[usize::from(port) / 8] |= 1 << (port % 8);
    }

    pub fn address(&self) -> u64 {
        (&raw const *self) as u64
    }
}
